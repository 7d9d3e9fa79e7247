"""MAP's module trains the head, with no edit of its source."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from standins import CLASSES, CLIPransformerSS, MemPrompt, ViLTransformerSS, config, map_batch
from torch import nn

from protohead import DecoupledPrototypeHead, attach, present_from_missing_type
from protohead.adapters.map import TaskHead, attach_map, fits

# Most of these heads are scored as they were made.
pytestmark = pytest.mark.filterwarnings("ignore:This head is in eval mode")

TYPES = [0.0, 1.0, 2.0, 0.0, 2.0, 1.0]


def map_model(task="hatememes", prompt_type="input", weight=0.5, **head_options):
    torch.manual_seed(0)
    module = ViLTransformerSS(config(task, prompt_type=prompt_type))
    assert attach_map(module, CLASSES[task], weight, head_options) is module
    return module


def head_of(module, task="hatememes"):
    return getattr(module, f"{task}_classifier").head


def cls_tokens(module, batch):
    """The two CLS tokens, from a run of the class's own `infer` with the norm's output written down."""
    kept = []
    hook = module.transformer.norm.register_forward_hook(lambda module, args, output: kept.append(output))
    ViLTransformerSS.infer(module, batch)
    hook.remove()
    x = kept[0]
    texts, images = batch["text_ids"].shape[1], 5  # Four patches and their CLS.
    return {"image": x[:, x.shape[1] - images], "text": x[:, x.shape[1] - images - texts]}


def expected_logits(module, batch, task, with_labels):
    """One row at a time, through a head that is given the mask by hand."""
    head, features = copy.deepcopy(head_of(module, task)), cls_tokens(module, batch)
    rows = []
    for i, code in enumerate(batch["missing_type"]):
        present = {0: ("image", "text"), 1: ("image",), 2: ("text",)}[int(code)]
        given = {name: features[name][i : i + 1] for name in present}
        label = torch.tensor(batch["label"])[i : i + 1]
        label = label.float() if task == "mmimdb" else label
        rows.append(head(given, None, label if with_labels else None))
    return torch.cat(rows)


@pytest.mark.parametrize("prompt_type", ["input", "attention"])
@pytest.mark.parametrize("task", list(CLASSES))
def test_logits_and_losses(task, prompt_type):
    module, batch = map_model(task, prompt_type), map_batch(task)
    module.eval().set_task()
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(
            module(batch)[f"{task}_logits"], expected_logits(module, batch, task, False), **close
        )

    module.train()
    total, output = module.training_step(batch), module(batch)
    logits = expected_logits(module, batch, task, True)
    torch.testing.assert_close(output[f"{task}_logits"], logits, **close)
    label = torch.tensor(batch["label"])
    if task == "mmimdb":
        loss = F.binary_cross_entropy_with_logits(logits, label.float())
    else:
        loss = F.cross_entropy(logits, label)
    torch.testing.assert_close(total, loss + 0.5 * head_of(module, task).prototype_loss(), **close)
    assert head_of(module, task).seen_cases == ("image+text", "image", "text")


def test_image_cls_is_what_infer_calls_so_in_input_mode():
    module, batch = map_model().eval(), map_batch()
    result = module.infer(batch=batch, is_train=False)
    features = cls_tokens(module, batch)
    torch.testing.assert_close(result["image_feats"][:, 0], features["image"])
    torch.testing.assert_close(result["text_feats"][:, 0], features["text"])
    assert module.transformer.norm._forward_hooks == {}


@pytest.mark.parametrize("prompt_type", ["input", "attention"])
def test_cls_feats_are_zero_where_missing(prompt_type):
    module, batch = map_model(prompt_type=prompt_type).eval(), map_batch()
    features = cls_tokens(module, batch)
    image, text = module.infer(batch)["cls_feats"].chunk(2, dim=1)
    for i, code in enumerate(TYPES):
        torch.testing.assert_close(image[i], features["image"][i] * (code != 2))
        torch.testing.assert_close(text[i], features["text"][i] * (code != 1))


def test_nan_in_a_missing_half_stays_there():
    module, batch = map_model().eval(), map_batch()
    clean = module.infer(batch)["cls_feats"]
    module.transformer.norm.register_forward_hook(
        lambda module, args, x: torch.where(torch.tensor(TYPES)[:, None, None] == 2, torch.nan, x)
    )
    spoilt = module.infer(batch)["cls_feats"]
    whole = torch.tensor(TYPES) != 2
    torch.testing.assert_close(spoilt[whole], clean[whole])
    assert spoilt[~whole, :16].eq(0).all()


@pytest.mark.parametrize("prompt_type", ["input", "attention"])
def test_trains_prompts_and_prototypes_only(prompt_type):
    module, batch = map_model("food101", prompt_type), map_batch("food101")
    optimizer = module.configure_optimizers()
    assert {id(p) for p in head_of(module, "food101").parameters()} == {
        id(p) for p in optimizer.param_groups[1]["params"]
    }
    before = {name: p.clone() for name, p in module.named_parameters()}
    losses = []
    for _ in range(40):
        loss = module.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    heads = {f"food101_classifier.head.prototypes.{name}" for name in ("image", "text")}
    assert changed == {"complete_prompt", "missing_text_prompt", "missing_img_prompt"} | heads
    # DDP refuses a trainable parameter without a gradient.
    assert {name for name, p in module.named_parameters() if p.requires_grad} == changed


def test_no_margin_and_no_prototype_loss_in_eval():
    module, batch = map_model(), map_batch()
    module.set_task()
    trained = module(batch)
    module.eval()
    output = module(batch)
    assert sorted(output) == ["hatememes_labels", "hatememes_logits", "hatememes_loss"]
    plain = head_of(module)(module.infer(batch)["cls_feats"])
    torch.testing.assert_close(output["hatememes_logits"], plain)
    labelled = torch.tensor(batch["label"])[:, None]
    assert (trained["hatememes_logits"].gather(1, labelled) < plain.gather(1, labelled)).all()
    del batch["label"]
    assert module.train().infer(batch)["cls_feats"]._protohead_rows[1] is None  # No labels, no loss, no margin.


def test_no_task_no_loss():
    module, batch = map_model(), map_batch()
    assert "cls_feats" in module(batch)
    assert not any("loss" in name for name in module(batch))


def test_masks_and_labels_belong_to_one_batch():
    module = map_model("food101").eval()
    classifier = module.food101_classifier
    first, second = map_batch("food101"), map_batch("food101", [2.0, 2.0, 1.0, 1.0, 0.0, 0.0], seed=1)
    alone = [classifier(module.infer(batch)["cls_feats"]) for batch in (first, second)]
    both = [module.infer(batch)["cls_feats"] for batch in (first, second)]
    for logits, features in zip(alone, both, strict=True):
        torch.testing.assert_close(classifier(features), logits)
        torch.testing.assert_close(classifier(features.clone()), logits)  # No mask: zeros are missing.
    module.train()
    with pytest.raises(RuntimeError, match=r'`infer\(batch\)\["cls_feats"\]` itself in training'):
        classifier(both[0].clone())


def test_the_missing_types_count_not_the_zeros():
    module, batch = map_model().eval(), map_batch(missing_type=[0.0, 0.0])

    def without_text(module, args, x):
        return torch.cat([x[:, :-5] * 0, x[:, -5:]], dim=1)

    module.transformer.norm.register_forward_hook(without_text)
    features = module.infer(batch)["cls_feats"]
    assert features[:, 16:].eq(0).all()
    logits = module.hatememes_classifier(features)
    torch.testing.assert_close(logits, head_of(module)(features, torch.ones(2, 2, dtype=torch.bool)))
    assert not torch.allclose(logits, head_of(module)(features))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_use_their_own_head(twin):
    module, batch = map_model(), map_batch()
    module.training_step(batch)
    other = twin(module)
    assert head_of(other) is not head_of(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.hatememes_classifier.prototype_weight = 0.0
    module.eval(), other.eval()
    module.set_task(), other.set_task()
    for each in (module, other):
        expected = expected_logits(each, batch, "hatememes", False)
        torch.testing.assert_close(each(batch)["hatememes_logits"], expected, rtol=1e-4, atol=1e-4)
    module.train(), other.train()
    assert module(batch)["hatememes_prototype_loss"] > 0
    assert other(batch)["hatememes_prototype_loss"] == 0
    other.hatememes_classifier = nn.Identity()  # The original does not notice.
    module(batch)


def test_a_copy_of_the_method_alone():
    module, batch = map_model().eval(), map_batch()
    infer = pickle.loads(pickle.dumps(module.infer))
    torch.testing.assert_close(infer(batch)["cls_feats"], module.infer(batch)["cls_feats"])


def test_checkpoint_round_trip():
    module, batch = map_model(margin=0.3), map_batch()
    module.training_step(batch)
    torch.manual_seed(1)
    other = attach_map(ViLTransformerSS(config("hatememes")), 2, None, {})
    other.load_state_dict(module.state_dict())
    for each in (module, other):
        each.eval().set_task()
    torch.testing.assert_close(other(batch)["hatememes_logits"], module(batch)["hatememes_logits"])
    assert head_of(other).margin.tolist() == [0.3] * 3


def test_default_settings():
    module = map_model(weight=None)
    assert module.hatememes_classifier.prototype_weight == 0.9
    assert head_of(module).shared_space
    assert head_of(module).scale.tolist() == [32.0] * 3
    module = map_model(scale=8.0, margin=0.2, shared_space=False)
    assert not head_of(module).shared_space
    assert head_of(module).scale.tolist() == [8.0] * 3


def test_dtype_and_mode_are_those_of_the_old_classifier():
    module = ViLTransformerSS(config("hatememes")).double().eval()
    attach_map(module, 2, None, {})
    assert not module.hatememes_classifier.training
    assert head_of(module).prototypes["image"].dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"missing_type": [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]}, ValueError, "3.0 in row 3"),
        ({"missing_type": [True] * 6}, TypeError, "boolean mask"),
        ({"missing_type": [0.0] * 5}, ValueError, "5"),
        ({"label": [0, 1, 2, 0, 0, 0]}, ValueError, r"in \[0, 2\), or -100, but got 2 in row 2"),
        ({"label": [0, 1]}, ValueError, r"int64 \(B,\)"),
        ({"label": [[0, 1]] * 6}, ValueError, r"int64 \(B,\)"),
    ],
)
def test_wrong_batches(change, error, match):
    module, batch = map_model(), map_batch() | change
    calls = []
    module.transformer.norm.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(error, match=match):
        module.training_step(batch)
    assert not calls  # MAP's own code has not run.


def test_multi_hot_labels_for_mmimdb_only():
    with pytest.raises(ValueError, match=r"floating-point \(B, 5\)"):
        map_model("mmimdb").training_step(map_batch("mmimdb") | {"label": [0, 1, 2, 0, 0, 0]})


@pytest.mark.parametrize("between", [0, 1, 3])
def test_memprompts_layout_is_refused(between):
    torch.manual_seed(0)
    module = MemPrompt(config("hatememes"), between)
    attach(module, 2)
    module.eval().set_task()
    if between:
        with pytest.raises(ValueError, match=r"MAP's layout, .* before image, .*in MemPrompt's layout"):
            module(map_batch())
    else:  # MAP's layout.
        close = {"rtol": 1e-4, "atol": 1e-4}
        batch = map_batch()
        result, logits = module.infer(batch), module(batch)["hatememes_logits"]
        features = torch.cat([result["image_feats"][:, 0], result["text_feats"][:, 0]], dim=1)
        present = present_from_missing_type(TYPES, ["image", "text"])
        torch.testing.assert_close(logits, head_of(module)(features, present), **close)


def test_the_layout_is_compared_by_value_where_infer_copies():
    module, batch = map_model().eval(), map_batch()
    plain = module.infer(batch)["cls_feats"]

    class Copies(ViLTransformerSS):
        def infer(self, *args, **kwargs):
            result = super().infer(*args, **kwargs)
            return result | {name: result[name].clone() for name in ("text_feats", "image_feats")}

    torch.manual_seed(0)
    other = attach_map(Copies(config("hatememes")), 2, None, {}).eval()
    torch.testing.assert_close(other.infer(batch)["cls_feats"], plain, rtol=1e-4, atol=1e-4)


def test_the_prototype_loss_is_logged_where_the_module_can_log():
    class Logs(ViLTransformerSS):
        def log(self, name, value):
            logged[name] = value

    logged = {}
    module = attach_map(Logs(config("hatememes")), 2, 0.5, {})
    module.set_task()
    output = module(map_batch())
    assert logged == {"hatememes/train/prototype_loss": output["hatememes_prototype_loss"]}
    assert not logged["hatememes/train/prototype_loss"].requires_grad
    logged.clear()
    module.eval()(map_batch())
    assert not logged


def test_a_failing_infer_leaves_no_hook():
    module, batch = map_model().eval(), map_batch()
    with pytest.raises(IndexError):
        module.infer(batch | {"text_ids": torch.full((6, 6), 99)})
    assert module.transformer.norm._forward_hooks == {}
    assert "cls_feats" in module.infer(batch)


def test_fits():
    assert fits(ViLTransformerSS(config("hatememes")))
    assert not fits(CLIPransformerSS(config("hatememes")))
    assert not fits(nn.Linear(2, 2))
    assert not fits({"image": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("tasks", "arguments", "error", "match"),
    [
        ((), (2, None, {}), ValueError, "exactly one of .*'hatememes_classifier'.* it has .*'transformer'"),
        (("hatememes", "mmimdb"), (2, None, {}), ValueError, r"it has \['hatememes_classifier', 'mmimdb_classifier'\]"),
        (("food101",), (5, None, {}), ValueError, "`num_classes` to be 7 as in food101_classifier, but got 5"),
        (("food101",), (7, -1.0, {}), ValueError, "`prototype_weight` to be a number in \\[0, inf\\), but got -1"),
        (("food101",), (7, float("nan"), {}), ValueError, "`prototype_weight`"),
        (("food101",), (7, True, {}), ValueError, "`prototype_weight`"),
        (("food101",), (7, None, {"scale": -1}), ValueError, "`scale` to be positive"),
        (("food101",), (7, None, {"margins": 1}), TypeError, "margins"),
    ],
)
def test_a_failure_leaves_the_module_as_it_was(tasks, arguments, error, match):
    module = ViLTransformerSS(config(*tasks))
    parts, keys, flags = dict(module.named_modules()), set(vars(module)), [p.requires_grad for p in module.parameters()]
    with pytest.raises(error, match=match):
        attach_map(module, *arguments)
    assert dict(module.named_modules()) == parts
    assert set(vars(module)) == keys
    assert [p.requires_grad for p in module.parameters()] == flags
    assert not module._forward_hooks


def test_other_modules_that_cannot_be_attached():
    module = map_model()
    with pytest.raises(ValueError, match="hatememes_classifier to be the module's own, but `attach` has put a head"):
        attach(module, 2)
    module = ViLTransformerSS(config("hatememes"))
    module.hatememes_classifier = nn.Identity()
    with pytest.raises(ValueError, match=r"hatememes_classifier to hold an nn\.Linear, but got Identity"):
        attach_map(module, 2, None, {})
    module = ViLTransformerSS(config("hatememes"))
    module.infer = lambda batch: {}
    with pytest.raises(ValueError, match="`infer` to be a method of ViLTransformerSS, but this module has its own"):
        attach_map(module, 2, None, {})
    assert isinstance(module.hatememes_classifier, nn.Sequential)


def test_hook_leaves_other_outputs_alone():
    # Under DDP, Lightning calls the module for its training_step, which returns a scalar.
    module = map_model()
    hook = next(iter(module._forward_hooks.values()))
    assert hook(module, (), torch.tensor(1.0)) is None
    assert isinstance(module.hatememes_classifier, TaskHead)
    assert isinstance(head_of(module), DecoupledPrototypeHead)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_lightning_trains_it(strategy, tmp_path):
    lightning = pytest.importorskip("lightning")

    class LightningViLT(ViLTransformerSS, lightning.LightningModule):
        pass

    torch.manual_seed(0)
    module = attach_map(LightningViLT(config("hatememes")), 2, 0.5, {})
    module.set_task()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(map_batch())  # Without a trainer there is nothing to log to, of which Lightning would warn.
    before = {name: p.clone() for name, p in module.named_parameters()}
    batches = torch.utils.data.DataLoader([map_batch(seed=seed) for seed in range(3)], batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert "hatememes_classifier.head.prototypes.image" in changed
    assert "pooler.dense.weight" not in changed
    assert head_of(module).seen_cases == ("image+text", "image", "text")
    logged = trainer.callback_metrics["hatememes/train/prototype_loss"]
    assert logged > 0
    module.train()
    torch.testing.assert_close(module(map_batch())["hatememes_prototype_loss"].detach(), logged, rtol=0.2, atol=0)
