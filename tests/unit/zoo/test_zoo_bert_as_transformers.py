"""BERT, its fine-tuning heads and RoBERTa against transformers: logits, losses, gradients, and
weights that are converted both ways."""

from __future__ import annotations

import pytest
import torch
from bert_reference import (
    LENGTH,
    THEIR_SIZES,
    VOCAB,
    converted,
    gradients_agree,
    masked_tokens,
    text_batch,
)

from openwafer.zoo import bert, bert_classifier, bert_ner, bert_qa, roberta

pytestmark = pytest.mark.slow  # importing transformers takes seconds; `make test-zoo` runs it


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def agree(family, ours, theirs, batch, expected, wanted):
    """Logits and loss within 1e-5, gradients within 1e-4."""
    logits = ours.logits(**batch)
    loss = ours.loss(logits, **batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients_agree(family, ours, theirs)


def tokens_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.mark.parametrize("tied", [True, False])
def test_pretraining(tied, transformers):
    config = transformers.BertConfig(**THEIR_SIZES, tie_word_embeddings=tied)
    config.architectures = ["BertForPreTraining"]
    theirs = transformers.BertForPreTraining(config)
    ours = converted(bert.FAMILY, theirs)
    batch, full = masked_tokens(text_batch())
    batch["next_sentence_label"] = torch.tensor([[0], [1], [1], [0]])
    expected = theirs(
        **tokens_of(batch), labels=full, next_sentence_label=batch["next_sentence_label"][:, 0]
    )
    places = batch["masked_lm_positions"][..., None].expand(-1, -1, VOCAB)
    wanted = {
        "masked_lm": expected.prediction_logits.gather(1, places),
        "next_sentence": expected.seq_relationship_logits,
    }
    agree(bert.FAMILY, ours, theirs, batch, expected, wanted)


def test_masked_tokens_alone(transformers):
    config = transformers.BertConfig(**THEIR_SIZES)
    config.architectures = ["BertForMaskedLM"]
    theirs = transformers.BertForMaskedLM(config)
    ours = converted(bert.FAMILY, theirs)
    batch, full = masked_tokens(text_batch())
    del batch["token_type_ids"]  # both take the first segment
    expected = theirs(batch["input_ids"], attention_mask=batch["attention_mask"], labels=full)
    everywhere = {**batch, "labels": full.clamp(min=0), "masked_lm_mask": (full >= 0).long()}
    del everywhere["masked_lm_positions"]
    torch.testing.assert_close(ours(**everywhere), ours(**batch))
    agree(bert.FAMILY, ours, theirs, everywhere, expected, {"masked_lm": expected.logits})


def test_roberta(transformers):
    config = transformers.RobertaConfig(
        **{**THEIR_SIZES, "max_position_embeddings": LENGTH + 2}, type_vocab_size=1
    )
    config.architectures = ["RobertaForMaskedLM"]
    theirs = transformers.RobertaForMaskedLM(config)
    ours = converted(roberta.FAMILY, theirs)
    # Positions of theirs depend on the padding token, 1; no other token is that.
    batch, full = masked_tokens(text_batch(num_segments=1, pad_id=1))
    expected = theirs(batch["input_ids"], attention_mask=batch["attention_mask"], labels=full)
    places = batch["masked_lm_positions"][..., None].expand(-1, -1, VOCAB)
    wanted = {"masked_lm": expected.logits.gather(1, places)}
    agree(roberta.FAMILY, ours, theirs, batch, expected, wanted)


def test_classifier(transformers):
    config = transformers.BertConfig(**THEIR_SIZES, num_labels=3)
    config.architectures = ["BertForSequenceClassification"]
    theirs = transformers.BertForSequenceClassification(config)
    ours = converted(bert_classifier.FAMILY, theirs)
    batch = {**text_batch(), "labels": torch.tensor([0, 2, 1, 2])}
    expected = theirs(**tokens_of(batch), labels=batch["labels"])
    agree(bert_classifier.FAMILY, ours, theirs, batch, expected, expected.logits)


def test_named_entities(transformers):
    config = transformers.BertConfig(**THEIR_SIZES, num_labels=5)
    config.architectures = ["BertForTokenClassification"]
    theirs = transformers.BertForTokenClassification(config)
    ours = converted(bert_ner.FAMILY, theirs)
    batch = text_batch()
    counted = batch["attention_mask"].clone()
    counted[:, ::3] = 0  # as the further pieces of a word
    batch = {**batch, "loss_mask": counted, "labels": batch["input_ids"] % 5 * counted}
    given = batch["labels"].masked_fill(counted == 0, -100)
    expected = theirs(**tokens_of(batch), labels=given)
    agree(bert_ner.FAMILY, ours, theirs, batch, expected, expected.logits)


def test_question_answering(transformers):
    config = transformers.BertConfig(**THEIR_SIZES)
    config.architectures = ["BertForQuestionAnswering"]
    theirs = transformers.BertForQuestionAnswering(config)
    ours = converted(bert_qa.FAMILY, theirs)
    labels = torch.tensor([[1, 3], [0, 0], [5, 11], [4, 4]])
    # Padding may be an answer too, so its tokens learn; all but token 0, which theirs leaves alone.
    batch = {**text_batch(pad_id=3), "labels": labels, "label_weights": torch.ones(4, 2)}
    expected = theirs(**tokens_of(batch), start_positions=labels[:, 0], end_positions=labels[:, 1])
    wanted = {"start": expected.start_logits, "end": expected.end_logits}
    agree(bert_qa.FAMILY, ours, theirs, batch, expected, wanted)
