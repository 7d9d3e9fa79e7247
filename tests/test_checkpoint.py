"""Files: a head from its file alone, a model's head, the Hugging Face hub's format, and files that are not right."""

import json

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn

from protohead import DecoupledPrototypeHead, PrototypeClassifier, load_head

WIDTHS = {"text": 3, "image": 5}  # Not in the order of the alphabet.
PRESENT = torch.tensor([[True, True], [True, False], [False, True]])
NAMES = ["cat", "dog", "emu", "fox"]


def trained_head(**options):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead(WIDTHS, 4, **{"class_names": NAMES, **options})
    head.loss(torch.randn(8, 8), None, torch.arange(8) % 4).backward()
    with torch.no_grad():
        for p in head.parameters():
            p -= 0.1 * p.grad
    head.scale.fill_(7)
    return head.eval()


def trained_model():
    torch.manual_seed(0)
    encoders = {"text": nn.Linear(2, 3), "image": nn.Linear(2, 5)}
    return PrototypeClassifier(encoders, trained_head()).eval()


def same(a, b):
    x = torch.randn(3, 8)
    assert repr(a) == repr(b)
    assert a.seen_cases == b.seen_cases
    assert torch.equal(a(x, PRESENT), b(x, PRESENT))
    assert torch.equal(a(x, PRESENT, torch.arange(3)), b(x, PRESENT, torch.arange(3)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cases": "all", "scale": 32, "centered": False, "class_names": None},
        {"cases": ["text+image", "image"], "margin": {"text+image": 0.3, "image": 0.2}, "dtype": torch.bfloat16},
    ],
)
def test_a_head_from_its_file_alone(tmp_path, options):
    head = trained_head(**options)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    torch.save({"state_dict": nn.ModuleDict({"model": head}).state_dict()}, tmp_path / "lightning.ckpt")
    other = load_head(tmp_path / "head.safetensors")
    same(other, head)
    assert not other.training
    assert other.class_names == head.class_names
    assert {p.dtype for p in other.parameters()} == {p.dtype for p in head.parameters()}
    same(load_head(torch.load(tmp_path / "lightning.ckpt")["state_dict"]), head)


def test_a_models_head_from_its_file_alone(tmp_path):
    model = trained_model()
    model.save(tmp_path / "model.safetensors")
    same(load_head(tmp_path / "model.safetensors"), model.head)
    save_model(model, str(tmp_path / "whole.safetensors"))
    same(load_head(str(tmp_path / "whole.safetensors")), model.head)


class HubHead(DecoupledPrototypeHead, PyTorchModelHubMixin):
    """What a user of the hub may write."""


def test_the_hubs_mixin(tmp_path):
    torch.manual_seed(0)
    head = HubHead({"image": 5, "text": 3}, 4, cases="all", margin=0.2, class_names=NAMES)
    head.loss(torch.randn(8, 8), None, torch.arange(8) % 4)
    head.save_pretrained(tmp_path)
    same(HubHead.from_pretrained(tmp_path).eval(), head.eval())
    assert load_head(tmp_path).extra_repr() == head.extra_repr()
    assert load_head(tmp_path / "model.safetensors").extra_repr() == head.extra_repr()


def test_the_hubs_mixin_sorts_names_which_is_refused(tmp_path):
    HubHead({"text": 4, "image": 4}, 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cases=\['image\+text'\], but got one with \['text\+image'\]"):
        HubHead.from_pretrained(tmp_path)
    assert load_head(tmp_path / "model.safetensors").modalities == ("text", "image")


def test_not_exactly_one_head():
    state = trained_head().state_dict()
    with pytest.raises(ValueError, match=r"exactly one head, .* but got 0: \[\]"):
        load_head({name: x for name, x in state.items() if name != "_extra_state"})
    two = {f"{prefix}.{name}": x for prefix in "ab" for name, x in state.items()}
    with pytest.raises(ValueError, match=r"exactly one head, .* but got 2: \['a\.', 'b\.'\]"):
        load_head(two)


def test_weights_that_do_not_make_a_head():
    state = trained_head().state_dict()
    for name in ("prototypes.image", "bias", "center_spread"):
        with pytest.raises(ValueError, match=f"(?s)cannot be made of them: .*{name}"):
            load_head({key: x for key, x in state.items() if key != name})
    config = json.loads(bytes(state["_extra_state"].long().tolist()))
    for change in (
        {"num_classes": "4"},
        {"cases": ["audio"]},
        {"in_features": [3, 5]},
        {"in_features": 5},
        {"in_features": None},
        {"more": 1},
    ):
        extra = torch.tensor(list(json.dumps({**config, **change}).encode()), dtype=torch.float32)
        with pytest.raises(ValueError, match="Expected"):
            load_head({**state, "_extra_state": extra})


def test_another_file(tmp_path):
    (tmp_path / "text").write_text("not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_head(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_head(tmp_path / "none")


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head.prototypes.image", float("nan")),
        ("head.bias", float("inf")),
        ("head.center", float("nan")),
        ("head.scale", float("nan")),
        ("head.scale", -3.0),
        ("head.margin", 3.2),
        ("head.margin", -0.1),
        ("head._extra_state", 200.0),
    ],
)
def test_values_that_no_head_has_are_refused(tmp_path, name, value):
    model = trained_model()
    model.save(tmp_path / "a")
    state, metadata = read(tmp_path / "a")
    save_file({**state, name: torch.full_like(state[name], value)}, tmp_path / "b", metadata)
    other = trained_model()
    with torch.no_grad():
        other.encoders.image.weight.zero_()
    before = {key: x.clone() for key, x in other.state_dict().items()}
    with pytest.raises(ValueError, match=name.removeprefix("head.")):
        other.load(tmp_path / "b")
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=name.removeprefix("head.")):
        load_head(tmp_path / "b")


@pytest.mark.parametrize("frozen", ["[" * 100_000, "[]", "3", '{"a": 3}', '{"a": ["x"]}', '{"a": null}', "null", ""])
def test_malformed_metadata(tmp_path, frozen):
    model = trained_model()
    model.save(tmp_path / "a")
    state, _ = read(tmp_path / "a")
    save_file(state, tmp_path / "b", {"frozen": frozen})
    with pytest.raises(ValueError, match="other metadata"):
        model.load(tmp_path / "b")


def test_class_names():
    head = DecoupledPrototypeHead(WIDTHS, 4)
    assert head.class_names is None
    head.load_state_dict(trained_head().state_dict())
    assert head.class_names == tuple(NAMES)
    with pytest.raises(ValueError, match="class_names"):
        DecoupledPrototypeHead(WIDTHS, 4, class_names=NAMES[::-1]).load_state_dict(head.state_dict())
    head.reset(2)
    assert head.class_names is None
    head.reset(2, ["yes", "no"])
    assert head.class_names == ("yes", "no")
    for wrong, error in ((["a"], ValueError), (["a", "a"], ValueError), ("ab", TypeError), ([1, 2], TypeError)):
        with pytest.raises(error, match="`class_names`"):
            DecoupledPrototypeHead(WIDTHS, 2, class_names=wrong)


@pytest.mark.parametrize(
    "change", [{"in_features": 5}, {"in_features": None}, {"num_classes": "4"}, {"class_names": 3}]
)
def test_a_malformed_description_is_refused_at_once(change):
    head, state = DecoupledPrototypeHead(WIDTHS, 4), trained_head().state_dict()
    config = {**json.loads(bytes(state["_extra_state"].long().tolist())), **change}
    extra = torch.tensor(list(json.dumps(config).encode()), dtype=torch.float32)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    with pytest.raises(ValueError, match="Expected"):
        head.load_state_dict({**state, "_extra_state": extra})
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)
