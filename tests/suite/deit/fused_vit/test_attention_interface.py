"""register_hf(): the operator as an attention of transformers, and what masks become."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")


import transformers  # isort: skip  (importing the models has put another module in its place)

from hf import IMAGES, close, make

from deit.fused_vit import attention_interface, fuse, register_hf

# Two prefix tokens and four patches: six keys.
PADDING = torch.ones(3, 6, dtype=torch.long)
PADDING[0, 4:] = 0
PADDING[2, 1] = 0
CAUSAL = torch.ones(6, 6).tril().bool().expand(3, 1, 6, 6)
MASKS = {
    "padding": PADDING,
    "nothing hidden": torch.ones(3, 6),
    "rows": PADDING.bool()[:, None, None, :],
    "dense rows": PADDING.bool()[:, None, None, :].expand(3, 1, 6, 6).contiguous(),
    "causal": CAUSAL,
    "additive": torch.zeros(3, 1, 6, 6).masked_fill(~CAUSAL, -1e4),
    "a bias of each key": torch.randn(3, 1, 1, 6, generator=torch.Generator().manual_seed(2)),
}


def masked(model, mask):
    if (
        model.config._attn_implementation == "eager"
        and mask.dtype == torch.bool
        and mask.dim() == 4
    ):
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    return model(IMAGES, attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "deit_fused"])
@pytest.mark.parametrize("fusing", [False, True])
def test_masks_are_honoured(attn, fusing, name):
    register_hf()
    want = masked(make(attn="eager"), MASKS[name])
    model = make(attn=attn)
    if fusing:
        fuse(model)
    close(masked(model, MASKS[name]), want)


@torch.no_grad()
def test_registered_attention_runs_the_operator(monkeypatch):
    calls = []
    operator = attention_interface.attention

    def spy(*args, **kwargs):
        calls.append(kwargs["key_bias"])
        return operator(*args, **kwargs)

    monkeypatch.setattr(attention_interface, "attention", spy)
    register_hf(impl="reference")
    model, plain = make(attn="deit_fused"), make()
    close(model(IMAGES), plain(IMAGES))
    assert calls == [None, None]
    model(IMAGES, attention_mask=PADDING)
    assert calls[2].shape == (3, 6)
    model(IMAGES, attention_mask=CAUSAL)
    assert len(calls) == 4  # SDPA's
    plain.set_attn_implementation("deit_fused")
    plain(IMAGES)
    assert len(calls) == 6


def test_registered_attention_trains_with_dropout():
    register_hf()
    options = {"attention_probs_dropout_prob": 0.5}
    got, want = make(attn="deit_fused", **options).train(), make(attn="sdpa", **options).train()
    outputs = []
    for model in (got, want):
        torch.manual_seed(1)
        outputs.append(model(IMAGES).logits)
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def test_key_bias_is_taken_from_strides_alone():
    row = torch.zeros(3, 1, 1, 6)
    assert attention_interface.as_key_bias(row.expand(3, 2, 6, 6), 3, 6).shape == (3, 6)
    assert attention_interface.as_key_bias(row[:1], 3, 6).shape == (3, 6)
    assert attention_interface.as_key_bias(torch.zeros(3, 1, 6, 6), 3, 6) is None
    assert attention_interface.as_key_bias(torch.zeros(3, 2, 1, 6), 3, 6) is None
    assert attention_interface.as_key_bias(torch.zeros(3, 1, 1, 6).int(), 3, 6) is None
    assert attention_interface.as_key_bias(row, 3, 7) is None
    hidden = attention_interface.as_key_bias(PADDING.bool()[:, None, None, :], 3, 6)
    assert torch.equal(hidden == float("-inf"), PADDING == 0)


def test_register_refuses(monkeypatch):
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of"):
        register_hf(impl="tpu")
    monkeypatch.setattr("transformers.__version__", "4.57.1")  # the module of that name today
    with pytest.raises(ImportError, match=r"version 5 or later; got 4\.57\.1"):
        register_hf()


def test_saving_and_loading_as_deit_fused(tmp_path):
    """The name is chosen anew at every loading, as transformers does it: no file holds it."""
    register_hf()
    model = make(attn="deit_fused")
    model.save_pretrained(tmp_path)
    assert "deit_fused" not in (tmp_path / "config.json").read_text()
    load = transformers.DeiTForImageClassification.from_pretrained
    plain, loaded = load(tmp_path), load(tmp_path, attn_implementation="deit_fused")
    assert loaded.config._attn_implementation == "deit_fused"
    with torch.no_grad():
        close(loaded.eval()(IMAGES), plain.eval()(IMAGES))
        close(loaded(IMAGES, output_hidden_states=True), plain(IMAGES, output_hidden_states=True))
    with pytest.raises(ValueError, match="`output_attentions` attribute is not supported"):
        loaded.config.output_attentions = True


TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
# Their masks: padding, causal, causal over keys that heads share, a bias of positions.
OTHERS = {
    "bert": lambda: transformers.BertConfig(**TEXT, intermediate_size=64),
    "clip text": lambda: transformers.CLIPTextConfig(
        **TEXT, intermediate_size=64, bos_token_id=0, eos_token_id=1
    ),
    "llama": lambda: transformers.LlamaConfig(
        **TEXT, intermediate_size=64, num_key_value_heads=2
    ),
    "t5": lambda: transformers.T5Config(d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64,
                                        vocab_size=50),
}  # fmt: skip
CLASSES = {
    "bert": transformers.BertModel,
    "clip text": transformers.CLIPTextModel,
    "llama": transformers.LlamaForCausalLM,
    "t5": transformers.T5EncoderModel,
}


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_that_take_attention_from_the_interface(kind, padded):
    """Masks that the kernel cannot take go to SDPA; none is dropped."""
    register_hf()
    ids = torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0 if padded else 1
    found = []
    for attn in ("eager", "deit_fused"):
        torch.manual_seed(0)
        model = CLASSES[kind]._from_config(OTHERS[kind](), attn_implementation=attn).eval()
        found.append(model(ids, attention_mask=mask)[0][mask.bool()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_across_two_sequences():
    """Queries of one length, keys of another: not packed, and so not the kernel's."""
    register_hf()
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
    )  # fmt: skip
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(3))
    found = []
    for attn in ("eager", "deit_fused"):
        torch.manual_seed(0)
        model = transformers.BartModel._from_config(config, attn_implementation=attn).eval()
        found.append(model(ids, decoder_input_ids=ids[:, :5])[0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
