"""Prompts in training: sub-cases that are encoded as such, cases that training never had, files, and which rows run."""

import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from test_prompts import BOTH, LABELS, MAKE, PRESENT, WIDTHS, batch, close, prompted, tiny

from protohead import DecoupledPrototypeHead, attach
from protohead.objective import Objective, encode_subcases

pytestmark = UNTRAINED


def parts(model):
    (towers,) = model.encoders.values()
    return towers, towers.towers.clip, towers.prompts


def counting(model):
    """How many rows each tower encodes, and for which modality and case prompts are made."""
    _, clip, prompts = parts(model)
    rows, calls = [], []
    clip.visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: rows.append(("image", len(args[0]))))
    clip.transformer.resblocks[0].register_forward_pre_hook(lambda _, args: rows.append(("text", len(args[0]))))
    prompts.register_forward_pre_hook(lambda _, args: calls.append(args))
    return rows, calls


@BOTH
def test_only_what_is_there_is_encoded_and_prompts_are_made_once_a_case(kind):
    model, inputs = prompted(kind), batch()
    rows, calls = counting(model)
    for m, name in enumerate(("image", "text")):
        inputs[name][~PRESENT[:, m]] = float("nan") if name == "image" else 99999
    model.encode(inputs, PRESENT)
    assert rows == [("image", 3), ("text", 4)]
    assert sorted(calls) == [("image", "image"), ("image", "image+text"), ("text", "image+text"), ("text", "text")]
    rows.clear(), calls.clear()
    model.encode({"text": inputs["text"]}, torch.tensor([[False, True]] * 6) & PRESENT)
    assert rows == [("text", 4)]
    assert calls == [("text", "text")]
    rows.clear()
    assert not model({}, torch.zeros(3, 2, dtype=torch.bool)).any()
    assert model.encode({}, torch.zeros(0, 2, dtype=torch.bool))["text"].shape == (0, 16)
    assert rows == []


@BOTH
def test_a_row_does_not_depend_on_its_batch(kind):
    model, inputs = prompted(kind).eval(), batch()
    together = model.encode(inputs, PRESENT)
    for row in range(6):
        alone = model.encode({name: x[row : row + 1] for name, x in inputs.items()}, PRESENT[row : row + 1])
        for name in WIDTHS:
            torch.testing.assert_close(alone[name][0], together[name][row], rtol=1e-5, atol=1e-5)
    lists = {
        name: [row if there else None for row, there in zip(x, PRESENT[:, m], strict=True)]
        for m, (name, x) in enumerate(inputs.items())
    }
    close({k: x.detach() for k, x in model.encode(lists).items()}, {k: x.detach() for k, x in together.items()})


def test_last_prompts_of_the_other_tower_are_not_made():
    model, inputs = prompted(), batch()
    stages, calls = parts(model)[2].stages, []
    for name in WIDTHS:
        for j, stage in enumerate(stages[name]):
            stage.register_forward_pre_hook(lambda *_, made=(name, j): calls.append(made))
    model.encode(inputs, torch.tensor([[True, False]] * 6))
    assert calls == [("image", 0), ("text", 0), ("image", 1), ("text", 1), ("image", 2)]


def test_rows_that_all_have_a_modality_stay_in_their_places():
    model, inputs = prompted().eval(), batch()
    mixed = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0], [1, 1], [1, 0]]).bool()
    together = model.encode(inputs, mixed)["image"]
    for row in range(6):
        alone = model.encode({name: x[row : row + 1] for name, x in inputs.items()}, mixed[row : row + 1])["image"]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
    some = parts(model)[0](inputs, dict.fromkeys(WIDTHS, torch.ones(3, dtype=torch.bool)), rows=torch.tensor([2, 2, 0]))
    torch.testing.assert_close(some["image"], together[[2, 2, 0]], rtol=1e-5, atol=1e-5)


def test_the_users_order_of_modalities():
    model, inputs = prompted(), batch()
    other = prompted(in_features={"text": 16, "image": 16})
    assert other.head.modalities == ("text", "image")
    got, expected = other.encode(inputs, PRESENT[:, [1, 0]]), model.encode(inputs, PRESENT)
    assert all(torch.equal(got[name], expected[name]) for name in WIDTHS)
    other(inputs, PRESENT[:, [1, 0]])
    assert parts(other)[0].seen.tolist() == parts(model)[0].seen.mul(2).tolist()


# -- sub-cases --------------------------------------------------------------------------------------------------------


def slow_loss(model, inputs, weight=0.5, scaled=1.0, rows=range(6)):
    """The objective by its definition: the batch, and some complete rows again, encoded with one modality."""
    present = PRESENT
    losses = F.cross_entropy(model.head(model.encode(inputs, present), present, LABELS), LABELS, reduction="none")
    kept = present.any(1)
    total = losses[kept].sum()
    for row in rows:
        if not present[row].all():
            continue
        for alone in ([True, False], [False, True]):
            mask = torch.tensor([alone])
            one = {name: x[row : row + 1] for name, x in inputs.items()}
            label = LABELS[row : row + 1]
            total = total + weight * scaled * F.cross_entropy(model.head(model.encode(one, mask), mask, label), label)
    return total / kept.sum() + 0.9 * model.head.prototype_loss()


@BOTH
@pytest.mark.parametrize("cases", ["shared", "all"])
def test_sub_cases_are_encoded_as_such(kind, cases):
    model, inputs = prompted(kind, cases=cases, centered=False), batch()
    slow_loss(model, inputs)  # All cases are seen.
    expected = slow_loss(model, inputs)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    rows, _ = counting(model)
    loss = model.loss(inputs, PRESENT, LABELS)
    loss.backward()
    assert rows == [("image", 3 + 2), ("text", 4 + 2)]  # Each tower runs once.
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-4, msg=name)


def test_complete_rows_train_the_prompts_of_missing_cases():
    model, inputs = prompted(), batch()
    complete = torch.ones(6, 2, dtype=torch.bool)
    _, _, prompts = parts(model)
    for weight, trained in ((0.5, True), (0.0, False)):
        model.zero_grad()
        rows, _ = counting(model)
        model.loss(inputs, complete, LABELS, subcase_weight=weight).backward()
        assert sum(count for _, count in rows) == (24 if trained else 12)
        assert [bool(prompts.dynamic[name].grad[1].any()) for name in WIDTHS] == [trained] * 2
        assert [bool(x.any()) for x in prompts.common.grad] == [True, trained, trained]


def test_a_share_of_the_rows():
    model, inputs = prompted(centered=False), batch(40)
    present, labels = torch.ones(40, 2, dtype=torch.bool), torch.arange(40) % 5
    rows, _ = counting(model)
    torch.manual_seed(0)
    model.loss(inputs, present, labels, subcase_share=0.25)
    assert rows == [("image", 50), ("text", 50)]
    # The weight makes up for the rows that are left out: the mean over draws is the whole.
    whole = model.loss(inputs, present, labels, prototype_weight=0).item()
    draws = torch.tensor(
        [model.loss(inputs, present, labels, prototype_weight=0, subcase_share=0.5).item() for _ in range(30)]
    )
    assert abs(draws.mean() - whole) < 4 * draws.std() / 30**0.5
    assert draws.std() > 0


def test_encode_subcases():
    present = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]]).bool()
    rows, mask, objective = encode_subcases(present, Objective(prototype_weight=0.3, label_smoothing=0.1))
    assert rows.tolist() == [0, 1, 2, 3, 0, 3, 0, 3]
    assert torch.equal(mask[:4], present)
    assert mask[4:].sum(1).tolist() == [1] * 4
    assert torch.equal(mask[4:6] ^ mask[6:], torch.ones(2, 2, dtype=torch.bool))
    assert (objective.subcases, objective.subcase_weight) == (4, 0.5)
    assert (objective.prototype_weight, objective.label_smoothing) == (0.3, 0.1)
    rows, mask, objective = encode_subcases(present, Objective(subcase_share=0.01))
    assert (len(rows), objective.subcases, objective.subcase_weight) == (6, 2, 1.0)
    for mask, options in ((present, Objective(subcase_weight=0)), (present[1:3], Objective(subcase_share=0.5))):
        rows, _, objective = encode_subcases(mask, options)
        assert (len(rows), objective.subcases) == (len(mask), 0)
    for wrong in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match=r"`subcase_share` to be a number in \(0, 1\]"):
            Objective(subcase_share=wrong)


def test_the_center_is_that_of_the_batch():
    model, inputs = prompted(), batch()
    model.loss(inputs, PRESENT, LABELS)
    features = model.encode(inputs, PRESENT)
    twin = DecoupledPrototypeHead({"image": 16, "text": 16}, 5, shared_space=True)
    twin.loss({name: x.detach() for name, x in features.items()}, PRESENT, LABELS)
    torch.testing.assert_close(model.head.center, twin.center, rtol=1e-5, atol=1e-6)
    assert model.head.center_rows.tolist() == twin.center_rows.tolist()


def test_labels_are_checked_before_anything_runs():
    model, inputs = prompted(), batch()
    rows, _ = counting(model)
    with pytest.raises(ValueError, match=r"int64 \(B,\)"):
        model.loss(inputs, PRESENT, LABELS[:5])
    with pytest.raises(ValueError, match=r"in \[0, 5\), or -100, but got 7 in row 0"):
        model.loss(inputs, PRESENT, LABELS + 7)
    with pytest.raises(ValueError, match="`labels` for the objective"):
        model(inputs, PRESENT, objective={})
    assert rows[:-2] == []
    several = F.one_hot(LABELS, 5).float()
    model.loss(inputs, PRESENT, several, class_weight=torch.rand(5)).backward()


# -- cases that training never had ------------------------------------------------------------------------------------


@BOTH
def test_a_case_that_training_never_had_uses_the_complete_ones_prompts(kind):
    model, inputs = prompted(kind), batch()
    only_image = torch.tensor([[True, False]] * 6)
    own = model.eval().encode(inputs, only_image)["image"]  # Nothing is seen yet.
    complete = torch.ones(6, 2, dtype=torch.bool)
    as_complete = model.encode(inputs, complete)["image"]
    assert not torch.equal(own, as_complete)
    model.train()(inputs, complete)
    with torch.no_grad():
        model.encode(inputs, only_image)  # To cache features is no training.
    assert parts(model)[0].seen.tolist() == [[6, 0], [6, 0]]
    torch.testing.assert_close(model.eval().encode(inputs, only_image)["image"], as_complete)
    mixed = model.encode(inputs, PRESENT)["image"]
    torch.testing.assert_close(mixed[PRESENT[:, 0]], as_complete[PRESENT[:, 0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train().encode(inputs, only_image)["image"], own)  # In training its own.
    assert parts(model)[0].seen.tolist() == [[6, 6], [6, 0]]
    torch.testing.assert_close(model.eval().encode(inputs, only_image)["image"], own)
    model.half().float()
    assert parts(model)[0].seen.tolist() == [[6, 6], [6, 0]]


@BOTH
def test_complete_rows_that_training_never_had_use_the_prompts_of_the_modality_alone(kind):
    """Those of complete rows are as they were drawn."""
    model, inputs = prompted(kind), batch()
    complete = torch.ones(6, 2, dtype=torch.bool)
    only_image = torch.tensor([[True, False]] * 6)
    model(inputs, only_image)
    model.eval()
    as_alone, own = model.encode(inputs, only_image)["image"], model.encode(inputs, complete)["text"]
    got = model.encode(inputs, complete)
    torch.testing.assert_close(got["image"], as_alone)
    torch.testing.assert_close(got["text"], own)  # Of texts nothing is seen.
    mixed = model.encode(inputs, PRESENT)["image"]
    torch.testing.assert_close(mixed[PRESENT[:, 0]], as_alone[PRESENT[:, 0]], rtol=1e-5, atol=1e-5)
    model.train().encode(inputs, complete)
    assert not torch.allclose(model.eval().encode(inputs, complete)["image"], as_alone)


@BOTH
def test_sub_cases_count_as_seen(kind):
    model, inputs = prompted(kind), batch()
    model.loss(inputs, torch.ones(6, 2, dtype=torch.bool), LABELS)
    assert parts(model)[0].seen.tolist() == [[6, 6], [6, 6]]


# -- files ------------------------------------------------------------------------------------------------------------


@BOTH
def test_files_hold_what_is_trained(kind, tmp_path):
    from safetensors import safe_open

    model, inputs = prompted(kind), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(12):
        loss = model.loss(inputs, PRESENT, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    model.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = {name for name in file.keys() if name.startswith("encoders.")}  # noqa: SIM118
    assert names == {name for name in trained if name.startswith("encoders.")} | {"encoders.image+text.seen"}
    assert [m.training for m in (parts(model)[2], parts(model)[1].transformer)] == [True, False]

    again = attach(tiny(), 5, prompts=MAKE[kind]())
    again.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(again.eval()(inputs, PRESENT), model.eval()(inputs, PRESENT))
    assert torch.equal(parts(again)[0].seen, parts(model)[0].seen)
    with pytest.raises(ValueError, match="frozen weights"):
        attach(tiny(seed=5), 5, prompts=MAKE[kind]()).load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        attach(tiny(), 5, prompts=MAKE["map" if kind == "dcp" else "dcp"]()).load(tmp_path / "model.safetensors")


def test_what_is_trained_can_be_chosen():
    model = prompted(trainable=())
    assert {name.split(".")[1] for name, p in model.encoders.named_parameters() if p.requires_grad} == {"prompts"}
    model = prompted(trainable="visual.ln_post.*")
    _, clip, _ = parts(model)
    assert [name for name, p in clip.named_parameters() if p.requires_grad] == [
        "visual.ln_post.weight",
        "visual.ln_post.bias",
    ]
    prompts = MAKE["dcp"]()
    prompts.common.requires_grad_(False)
    assert not parts(prompted(prompts))[2].common.requires_grad  # The user's own choice.


def test_two_models_on_one_clip():
    clip, inputs = tiny(), batch()
    first, second = prompted("dcp", clip).eval(), prompted("map", clip).eval()
    assert torch.equal(first(inputs, PRESENT), prompted("dcp").eval()(inputs, PRESENT))
    assert torch.equal(second(inputs, PRESENT), prompted("map").eval()(inputs, PRESENT))
