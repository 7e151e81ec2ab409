"""BERT's fine-tuning families: padding, losses against their formulas, predictions, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bert_reference import LENGTH, slow, small, text_batch, wider, with_filling_rows

import openwafer
from openwafer.zoo import bert, bert_classifier, bert_ner, bert_qa, bert_summarization
from openwafer.zoo.bert.torch_model import BertConfig


def classifier_batch():
    return {**text_batch(), "labels": torch.tensor([0, 2, 1, 2])}


def ner_batch():
    batch = text_batch()
    batch["loss_mask"] = batch["attention_mask"] * (torch.arange(LENGTH) % 3 > 0)
    return {**batch, "labels": batch["input_ids"] % 5 * batch["loss_mask"]}


def summarization_batch():
    places = torch.tensor([[0, 4, 6], [0, 2, 0], [0, 5, 9], [3, 0, 0]])
    weights = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.float32)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0]])
    return {**text_batch(), "cls_indices": places, "cls_weights": weights, "labels": labels}


HEADS = {
    "classifier": (bert_classifier.FAMILY, {"num_labels": 3}, classifier_batch),
    "ner": (bert_ner.FAMILY, {"num_classes": 5}, ner_batch),
    "summarization": (bert_summarization.FAMILY, {}, summarization_batch),
}


@pytest.mark.parametrize("head", HEADS)
def test_padding_and_filling_rows_change_nothing(head):
    family, changes, make = HEADS[head]
    model, batch = small(family, **changes), make()
    logits = model.logits(**batch)
    more = model.logits(**wider(batch))
    torch.testing.assert_close(more[:, :LENGTH] if head == "ner" else more, logits)
    torch.testing.assert_close(model(**with_filling_rows(batch)), model.loss(logits, **batch))


def test_answers_to_questions_do_not_depend_on_padding():
    model, batch = small(bert_qa.FAMILY), text_batch()
    logits, more = model.logits(**batch), model.logits(**wider(batch))
    for end in ("start", "end"):
        torch.testing.assert_close(more[end][:, :LENGTH], logits[end])
    spans, same = model.predictions(logits, **batch), model.predictions(more, **wider(batch))
    torch.testing.assert_close(same, spans)
    batch |= {"labels": torch.tensor([[1, 3]] * 4), "label_weights": torch.ones(4, 2)}
    full = with_filling_rows(batch)
    torch.testing.assert_close(model(**full), model(**batch))


def test_the_best_answer_is_found_by_looking_at_all():
    generator = torch.Generator().manual_seed(4)
    model, batch = small(bert_qa.FAMILY, max_answer_length=4), text_batch(num_rows=40)
    batch["token_type_ids"] = (torch.arange(LENGTH) >= 5).long().expand(40, -1)
    logits = {end: torch.randn(40, LENGTH, generator=generator) for end in ("start", "end")}
    found = model.predictions(logits, **batch)
    answers = 0
    for row in range(40):
        last = int(batch["attention_mask"][row].sum())
        spans = [(0, 0)] + [(s, e) for s in range(5, last) for e in range(s, min(s + 4, last))]
        scores = {(s, e): logits["start"][row, s] + logits["end"][row, e] for s, e in spans}
        best = max(scores, key=lambda span: scores[span])
        assert (int(found["start"][row]), int(found["end"][row])) == best
        assert found["score"][row] == scores[best]
        answers += best != (0, 0)
    assert 0 < answers < 40


@pytest.mark.parametrize("scaling", ["num_tokens", "batch_size"])
def test_summarization_is_bertsum_spelled_out(scaling):
    model = small(bert_summarization.FAMILY, loss_scaling=scaling, loss_weight=0.5)
    batch = summarization_batch()
    total, count, logits = torch.zeros(()), 0, model.logits(**batch)
    probabilities = model.predictions(logits, **batch)["probability"]
    for row in range(4):
        # One sample at a time, without its padding.
        length = int(batch["attention_mask"][row].sum())
        tokens = (batch[name][row : row + 1, :length] for name in TOKENS)
        hidden = model.backbone(*tokens)[0]
        for place in range(3):
            if not batch["cls_weights"][row, place]:
                assert probabilities[row, place] == 0.0
                continue
            vector = hidden[batch["cls_indices"][row, place]]
            score = vector @ model.classifier.weight[0] + model.classifier.bias[0]
            chance = 1 / (1 + torch.exp(-score))
            in_summary = bool(batch["labels"][row, place])
            total = total - torch.log(chance if in_summary else 1 - chance)
            count += 1
            torch.testing.assert_close(logits[row, place], score)
            torch.testing.assert_close(probabilities[row, place], chance)
    divisor = count if scaling == "num_tokens" else 4
    torch.testing.assert_close(model.loss(logits, **batch), total / divisor * 0.5)


TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def test_loss_of_entities_divided_by_the_samples():
    model, batch = small(bert_ner.FAMILY, num_classes=5), ner_batch()
    other = small(bert_ner.FAMILY, num_classes=5, loss_scaling="batch_size", loss_weight=0.25)
    logits, counted = model.logits(**batch), batch["loss_mask"] == 1
    total = F.cross_entropy(logits[counted], batch["labels"][counted], reduction="sum")
    torch.testing.assert_close(model(**batch), total / counted.sum())
    torch.testing.assert_close(other(**batch), total / 4 * 0.25)


@pytest.mark.parametrize("head", [*HEADS, "qa"])
def test_a_pretrained_backbone_fits(head):
    """Every weight of a head but the classifier is in a pre-training checkpoint, of one shape."""
    family, changes, _ = HEADS.get(head, (bert_qa.FAMILY, {}, None))
    pretrained = small(bert.FAMILY).state_dict()
    model = small(family, **changes)
    new = {name for name in model.state_dict() if name not in pretrained}
    assert new == {"classifier.weight", "classifier.bias"}
    model.load_state_dict({**model.state_dict(), **pretrained_part(model, pretrained)})


def pretrained_part(model, pretrained):
    return {name: pretrained[name] for name in model.state_dict() if name in pretrained}


# The fact sheet (section 7) counts the pre-training network in the place of a head, with a pooler:
# 110.1 and 336.2 million. The heads of Hugging Face's models give these numbers.
COUNTS = {
    "bert_classifier/base_sst2": 109_483_778,
    "bert_classifier/base_mnli": 109_484_547,
    "bert_classifier/large_sst2": 335_143_938,
    "bert_classifier/large_mnli": 335_144_963,
    "bert_ner/base_bc5cdr_chem": 108_893_955,
    "bert_ner/large_bc5cdr_chem": 334_095_363,
    "bert_qa/base_squad": 108_893_186,
    "bert_qa/large_squad": 334_094_338,
    "bert_summarization/base": 108_892_417,
    "bert_summarization/large": 334_093_313,
}


@pytest.mark.parametrize(
    "name", ["bert_classifier/base_sst2", *(slow(name) for name in list(COUNTS)[1:])]
)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = openwafer.zoo.build(name)
        size = "base" if "base" in name else "large"
        pretraining = openwafer.zoo.build(f"bert/{size}_msl128")
    assert model.num_parameters == COUNTS[name]
    of_head = sum(w.numel() for n, w in model.named_parameters() if n.startswith("classifier"))
    of_pooler = {"base": 590_592, "large": 1_049_600}[size] * (model.backbone.pooler is None)
    of_their_heads = sum(
        w.numel()
        for n, w in pretraining.named_parameters()
        if n.startswith(("masked_token_head", "next_sentence_head"))
    )
    counted = model.num_parameters - of_head + of_pooler + of_their_heads
    assert round(counted / 1e6, 1) == {"base": 110.1, "large": 336.2}[size]
    assert isinstance(pretraining.config, BertConfig)
