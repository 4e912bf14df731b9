// Written by `python -m deit.kernels.prove.schemas`.
"add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor? "
    "gamma, Tensor? keep) -> (Tensor, Tensor)",
"attention(Tensor qkv, int num_heads, float scale, Tensor? key_bias) -> Tensor",
"gelu_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, Tensor?"
    " gamma, Tensor? keep, str? activation=None) -> Tensor",
"layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
"linear(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? "
    "gamma, Tensor? keep) -> Tensor",
"patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor pos_embed) "
    "-> Tensor",
