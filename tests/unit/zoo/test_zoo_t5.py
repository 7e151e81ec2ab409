"""T5 against `transformers`: logits, loss, gradients, weights both ways, and the sizes."""

from __future__ import annotations

import json
import re

import pytest
import torch

from openwafer import zoo
from openwafer.data import build_dataset
from openwafer.errors import CheckpointError, ConfigError
from openwafer.frontends.torch.capture import capture_module
from openwafer.pipeline import validate_program
from openwafer.zoo import catalog
from openwafer.zoo.t5 import FAMILY, T5Config, T5Model

LENGTHS = {"src_max_sequence_length": 14, "tgt_max_sequence_length": 9}
KINDS = {
    "relu, shared output": {"feed_forward_proj": "relu"},
    "gated, own output": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


@pytest.fixture(params=KINDS, scope="module")
def pair(request):
    """Theirs with random weights, and ours with the same weights by the rules."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    their_config = transformers.T5Config(
        vocab_size=61, d_model=20, d_kv=6, d_ff=28, num_layers=2, num_decoder_layers=3, num_heads=3,
        decoder_start_token_id=0, **KINDS[request.param],
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(their_config).eval()
    if not their_config.scale_decoder_outputs:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(61, 20))
    section = FAMILY.weights.config_from(json.loads(their_config.to_json_string(use_diff=False)))
    ours = T5Model(T5Config.from_section({**section, **LENGTHS})).eval()
    ours.load_state_dict(to_ours(theirs.state_dict(), ours.config), strict=False)
    return theirs, ours


def pairs_of_names(config):
    for rule in FAMILY.weights.rules(config):
        assert len(rule.theirs) == 1
        assert rule.join is None
        for layer in range(getattr(config, rule.layers) if rule.layers else 1):
            yield rule.ours.format(layer=layer), rule.theirs[0].format(layer=layer)


def to_ours(theirs, config):
    return {ours: theirs[name] for ours, name in pairs_of_names(config)}


def batch_of(model):
    torch.manual_seed(4)
    batch = model.example_batch(3)
    batch["attention_mask"][1, 9:] = 0
    batch["decoder_attention_mask"][1, 4:] = 0
    batch["decoder_attention_mask"][2, 7:] = 0
    return batch


def run_theirs(theirs, batch):
    labels = batch["labels"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
    return theirs(**{**batch, "labels": labels})


@pytest.mark.slow  # importing transformers takes seconds
def test_logits_loss_and_gradients_are_those_of_transformers(pair):
    theirs, ours = pair
    batch = batch_of(ours)
    expected = run_theirs(theirs, batch)
    torch.testing.assert_close(ours.logits(**batch), expected.logits, rtol=1e-5, atol=1e-5)
    loss = ours(**batch)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    theirs.zero_grad()
    ours.zero_grad()
    expected.loss.backward()
    loss.backward()
    their_gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    our_gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    expected_gradients = to_ours(their_gradients, ours.config)
    assert our_gradients.keys() == expected_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # importing transformers takes seconds
def test_weights_and_configuration_there_and_back(pair):
    theirs, ours = pair
    transformers = pytest.importorskip("transformers")
    written = FAMILY.weights.config_to(ours.config)
    json.dumps(written)
    again = transformers.T5ForConditionalGeneration(transformers.T5Config(**written)).eval()
    if not ours.config.share_embedding_weights:
        again.lm_head.weight = torch.nn.Parameter(torch.empty(61, 20))
    state = ours.state_dict()
    back = {name: state[our_name] for our_name, name in pairs_of_names(ours.config)}
    missing, unexpected = again.load_state_dict(back, strict=False)
    assert not unexpected
    assert all(name.startswith((*FAMILY.weights.ignored, "lm_head.")) for name in missing)
    again.tie_weights() if ours.config.share_embedding_weights else None
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = batch_of(ours)
    assert torch.equal(run_theirs(again, batch).logits, run_theirs(theirs, batch).logits)
    section = FAMILY.weights.config_from(json.loads(again.config.to_json_string(use_diff=False)))
    assert T5Config.from_section({**section, **LENGTHS}) == ours.config


@pytest.mark.slow  # importing transformers takes seconds
def test_every_weight_of_theirs_has_a_rule_or_is_ignored(pair):
    theirs, ours = pair
    known = {name for _, name in pairs_of_names(ours.config)}
    tied = {"lm_head.weight"} if ours.config.share_embedding_weights else set()
    for name in theirs.state_dict():
        assert name in known | tied or name.startswith(FAMILY.weights.ignored), name


@pytest.mark.slow
@pytest.mark.parametrize("own_output", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_saved_folders_load_whether_the_output_is_shared_or_not(tmp_path, own_output, scaled):
    """Their config.json does not say whether it is: the names of the tensors do."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=scaled,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    if own_output:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(31, 16))
    theirs.save_pretrained(tmp_path)
    ours = zoo.from_pretrained(tmp_path).eval()
    assert ours.config.share_embedding_weights == (not own_output)
    batch = ours.example_batch(2)
    expected = run_theirs(theirs, batch)
    torch.testing.assert_close(ours.logits(**batch), expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"use_t5_layer_norm": False}, "use_t5_layer_norm"),
        ({"decoder_nonlinearity": "gelu"}, "decoder_nonlinearity"),
        ({"share_encoder_decoder_embedding": False}, "share_encoder_decoder_embedding"),
        ({"encoder_nonlinearity": "gated-gelu"}, "encoder_nonlinearity"),
    ],
)
def test_what_their_checkpoints_cannot_hold_is_refused(changes, key):
    with pytest.raises(CheckpointError, match=key):
        FAMILY.weights.config_to(T5Config(src_vocab_size=9, **changes))


@pytest.mark.parametrize(("size", "published"), [("small", "52.1"), ("base", "222.9")])
def test_parameter_counts(size, published):
    """Tied weights once; the token table has the 32,001 tokens and the 100 sentinels."""
    with torch.device("meta"):
        model = zoo.build(f"t5/{size}")
    assert f"{model.num_parameters / 1e6:.1f}" == published
    assert model.example_batch(2)["labels"].is_meta


def test_what_is_behind_the_padding_changes_nothing():
    torch.manual_seed(5)
    model = small_model().eval()
    batch = batch_of(model)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][1, 9:] = 7
    changed["decoder_input_ids"][1, 4:] = 7
    changed["labels"][1, 4:] = 7
    assert torch.equal(model(**batch), model(**changed))
    # And the loss is the mean over the real tokens, whatever stands beside them.
    alone = {name: tensor[1:2] for name, tensor in batch.items()}
    alone = {n: t[:, :4] if "decoder" in n or n == "labels" else t[:, :9] for n, t in alone.items()}
    whole = {name: tensor[1:2] for name, tensor in batch.items()}
    torch.testing.assert_close(model(**alone), model(**whole))


def test_both_modes_run_every_operation():
    """With the table of distances used by two layers, and a loss weight from the data."""
    model = small_model(decoder_num_hidden_layers=1)
    batch = {**model.example_batch(2), "loss_weight": torch.ones(2, 1)}
    program = capture_module(model, batch).program
    for mode in ("layer_pipelined", "weight_streaming"):
        report = validate_program(program, mode)
        assert report.coverage == 1.0, str(report)


def test_loss_scalings():
    model = small_model(dropout_rate=0.0)
    batch = batch_of(model)
    mean = model(**batch)
    num_tokens = batch["decoder_attention_mask"].sum()
    by_batch = small_model(dropout_rate=0.0, loss_scaling="batch_size", lm_loss_weight=0.5)
    by_batch.load_state_dict(model.state_dict())
    torch.testing.assert_close(by_batch(**batch), mean * num_tokens / 3 * 0.5)
    weight = torch.full((3, 1), 3.0) / num_tokens
    torch.testing.assert_close(model(**batch, loss_weight=weight), mean)


def test_generation_gives_what_the_model_predicts_from_it():
    model = small_model()
    batch = batch_of(model)
    tokens = model.generate(batch, 6)
    assert model.training
    model.eval()
    given = torch.cat([batch["decoder_input_ids"][:, :1], tokens], dim=1)[:, :-1]
    forced = {**batch, "decoder_input_ids": given, "decoder_attention_mask": torch.ones_like(given)}
    assert torch.equal(model.logits(**forced).argmax(-1), tokens)
    ended = model.generate(batch, 6, eos_id=int(tokens[0, 2]))
    assert ended[0].tolist() == [*tokens[0, :3].tolist(), 0, 0, 0] or int(tokens[0, 2]) in (
        tokens[0, :2].tolist()
    )


def test_same_seed_same_weights():
    torch.manual_seed(8)
    first = small_model().state_dict()
    torch.manual_seed(8)
    second = small_model().state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["rleu", "gated-rleu"])
def test_unknown_nonlinearity(name):
    with pytest.raises(ConfigError, match=re.escape(name)) as caught:
        small_model(encoder_nonlinearity=name)
    assert "relu" in caught.value.hint


def small_model(**changes):
    keys = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2, **LENGTHS}
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2}
    return T5Model(T5Config(src_vocab_size=40, extra_ids=5, **{**keys, **layers, **changes}))


@pytest.mark.parametrize("section", ["train_input", "eval_input"])
def test_example_batch_is_like_the_data(section):
    model, params = zoo.build("t5/tiny"), catalog.load("t5/tiny").raw[section]
    data = build_dataset("span_corruption", params, section.removesuffix("_input")).example_batch(3)
    example = model.example_batch(3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in data.items()
    }
    assert torch.isfinite(model(**data))
