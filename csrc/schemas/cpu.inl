// Written by `python -m deit.kernels.prove.schemas`.
"add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor? "
    "gamma, Tensor? keep) -> (Tensor, Tensor)",
"add_layer_norm_bwd(Tensor dout, Tensor dtotal, Tensor? x, Tensor total, Tensor weight, "
    "Tensor mean, Tensor rstd, Tensor? gamma, Tensor? keep, bool[]? wanted=None) -> (Tensor dx,"
    " Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dgamma)",
"add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, "
    "Tensor? gamma, Tensor? keep) -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)",
"attention(Tensor qkv, int num_heads, float scale, Tensor? key_bias) -> Tensor",
"attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale,"
    " Tensor? key_bias) -> Tensor dqkv",
"attention_fwd(Tensor qkv, int num_heads, float scale, Tensor? key_bias) -> (Tensor out, "
    "Tensor lse)",
"cross_attention(Tensor q, Tensor kv, int num_heads, float scale) -> Tensor",
"cross_entropy(Tensor logits, Tensor target, float label_smoothing) -> Tensor",
"cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, float "
    "label_smoothing) -> Tensor dlogits",
"cross_entropy_fwd(Tensor logits, Tensor target, float label_smoothing) -> (Tensor loss, "
    "Tensor statistics)",
"distillation_loss(Tensor logits, Tensor target, Tensor teacher_logits, Tensor? "
    "distillation_logits, str kind, float alpha, float temperature, float label_smoothing, str "
    "kl_reduction) -> Tensor",
"distillation_loss_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor teacher_logits, "
    "Tensor? distillation_logits, Tensor statistics, str kind, float alpha, float temperature, "
    "float label_smoothing, str kl_reduction, bool[]? wanted=None) -> (Tensor dlogits, Tensor "
    "ddistillation_logits)",
"distillation_loss_fwd(Tensor logits, Tensor target, Tensor teacher_logits, Tensor? "
    "distillation_logits, str kind, float alpha, float temperature, float label_smoothing, str "
    "kl_reduction) -> (Tensor loss, Tensor statistics)",
"gelu_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, Tensor?"
    " gamma, Tensor? keep, str? activation=None) -> Tensor",
"gelu_mlp_bwd(Tensor dout, Tensor? x, Tensor w1, Tensor w2, Tensor hidden, Tensor? affine, "
    "Tensor? gamma, Tensor? keep, bool[]? wanted=None, str? activation=None) -> (Tensor dx, "
    "Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgamma)",
"gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
    "Tensor? gamma, Tensor? keep, str? activation=None) -> (Tensor out, Tensor hidden, Tensor "
    "affine)",
"int8_gelu_mlp_packed(Tensor x, Tensor packed1, Tensor scales1, Tensor sums1, Tensor? b1, "
    "Tensor packed2, Tensor scales2, Tensor sums2, Tensor? b2, Tensor? norm_weight, Tensor? "
    "norm_bias, float eps, Tensor? residual, Tensor? gamma) -> Tensor",
"int8_linear_packed(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, bool gelu, Tensor? residual, Tensor? "
    "gamma) -> Tensor",
"int8_vit_block_packed(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, Tensor qkv, "
    "Tensor qkv_scales, Tensor qkv_sums, Tensor? qkv_bias, Tensor proj, Tensor proj_scales, "
    "Tensor proj_sums, Tensor? proj_bias, Tensor? gamma1, Tensor norm2_weight, Tensor? "
    "norm2_bias, Tensor w1, Tensor w1_scales, Tensor w1_sums, Tensor? b1, Tensor w2, Tensor "
    "w2_scales, Tensor w2_sums, Tensor? b2, Tensor? gamma2, Tensor? key_bias, int num_heads, "
    "float scale, float eps) -> Tensor",
"layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
"layer_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[]? "
    "wanted=None) -> (Tensor dx, Tensor dweight, Tensor dbias)",
"layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor out, Tensor "
    "mean, Tensor rstd)",
"linear(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? "
    "gamma, Tensor? keep) -> Tensor",
"linear_bwd(Tensor dout, Tensor? x, Tensor weight, Tensor? affine, str? activation, Tensor?"
    " gamma, Tensor? keep, bool[]? wanted=None) -> (Tensor dx, Tensor dweight, Tensor dbias, "
    "Tensor dgamma)",
"linear_fwd(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, "
    "Tensor? gamma, Tensor? keep) -> (Tensor out, Tensor affine)",
"linear_thirds(Tensor x, Tensor first, Tensor second, Tensor third, Tensor? bias) -> Tensor",
"patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor pos_embed) "
    "-> Tensor",
"patch_embed_bwd(Tensor dout, Tensor? images, Tensor weight, int prefix_tokens, bool[]? "
    "wanted=None) -> (Tensor dweight, Tensor dbias, Tensor dprefix, Tensor dpos_embed)",
"rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
"rms_norm_bwd(Tensor dout, Tensor x, Tensor weight, Tensor rstd, bool[]? wanted=None) -> "
    "(Tensor dx, Tensor dweight)",
"rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
"rotary_attention(Tensor qkv, int num_heads, float scale, Tensor sin, Tensor cos, int "
    "prefix, bool interleaved) -> Tensor",
"rotary_attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float"
    " scale, Tensor sin, Tensor cos, int prefix, bool interleaved) -> Tensor dqkv",
"rotary_attention_fwd(Tensor qkv, int num_heads, float scale, Tensor sin, Tensor cos, int "
    "prefix, bool interleaved) -> (Tensor out, Tensor lse)",
"vit_block(Tensor x, Tensor? row_stats, Tensor norm1_weight, Tensor? norm1_bias, Tensor "
    "qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? gamma1, "
    "Tensor norm2_weight, Tensor? norm2_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? gamma2, Tensor? key_bias, int num_heads, float scale, float eps, str? "
    "activation=None) -> (Tensor, Tensor)",
"vit_block_rotary(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, Tensor q_weight, "
    "Tensor? k_weight, Tensor? v_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? "
    "proj_bias, Tensor? gamma1, Tensor norm2_weight, Tensor? norm2_bias, Tensor w1, Tensor? b1,"
    " Tensor w2, Tensor? b2, Tensor? gamma2, Tensor sin, Tensor cos, int prefix, bool "
    "interleaved, int num_heads, float scale, float eps, str? activation=None) -> (Tensor, "
    "Tensor)",
"vit_block_thirds(Tensor x, Tensor norm1_weight, Tensor? norm1_bias, Tensor q_weight, "
    "Tensor k_weight, Tensor v_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias,"
    " Tensor? gamma1, Tensor norm2_weight, Tensor? norm2_bias, Tensor w1, Tensor? b1, Tensor "
    "w2, Tensor? b2, Tensor? gamma2, Tensor? key_bias, int num_heads, float scale, float eps, "
    "str? activation=None) -> (Tensor, Tensor)",
