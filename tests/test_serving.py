"""Models that `attach` has made in recorded graphs: torch.export, ONNX, torch.compile; and the page in docs."""

import copy

import onnxruntime
import pytest
import torch
from test_prompts import LABELS, PRESENT, WIDTHS, batch, prompted, tiny
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from protohead import attach
from protohead.prompts import DcpPrompts

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler

SIZES = {"image": (3, 32, 32), "text": (9,)}


def own():
    torch.manual_seed(0)
    image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    text = nn.Sequential(nn.Embedding(64, 8), nn.Flatten(), nn.Linear(72, 6))
    return attach({"image": image, "text": text}, 5, in_features={"image": 8, "text": 6}, trainable="*")


def hugging_face(prompts=None):
    from transformers import CLIPConfig, CLIPModel

    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"vocab_size": 64, "max_position_embeddings": 9, "eos_token_id": 63, "bos_token_id": 1, "pad_token_id": 0}
    text = {"hidden_size": WIDTHS["text"], **common, **tokens}
    vision = {"hidden_size": WIDTHS["image"], **common, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return attach(clip, 5, prompts=prompts)


def as_dicts(inputs):
    ids = inputs["text"]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"image": {"pixel_values": inputs["image"]}, "text": text}


def dcp():
    return prompted(DcpPrompts(WIDTHS, length=3, depth=2), tiny(layers=2))


def same(inputs):
    return inputs


MODELS = {
    "own": (own, same),
    "open_clip": (lambda: attach(tiny(layers=2), 5), same),
    "transformers": (hugging_face, as_dicts),
    "prompts": (dcp, same),
}


def unusable(inputs):
    """What no encoder can take where a modality is missing."""
    image = torch.where(PRESENT[:, 0, None, None, None], inputs["image"], torch.nan)
    return {"image": image, "text": torch.where(PRESENT[:, 1, None], inputs["text"], 10**6)}


def fitted(make, form):
    """The model in eval mode, whose head has a center and has not seen rows without text."""
    model, inputs = make(), form(batch())
    rows = torch.tensor([0, 2, 3, 5])
    features = model.eval().encode(inputs, PRESENT)
    model.head.imprint({name: x[rows] for name, x in features.items()}, LABELS[rows], PRESENT[rows])
    if hasattr(model.encoders, "image+text") and hasattr(model.encoders["image+text"], "seen"):
        model.encoders["image+text"].seen.copy_(torch.tensor([[3, 0], [3, 3]]))
    return model


def dynamic(*args):
    dim = torch.export.Dim("batch")
    return tree_map(lambda x: {0: dim}, args)


@pytest.mark.parametrize("name", MODELS)
def test_export_and_onnx(name):
    """Every row is encoded; whatever stands in missing ones, the logits are those of eager mode."""
    make, form = MODELS[name]
    model, args = fitted(make, form), (form(batch()), PRESENT)
    expected = model(*args).detach()
    program = torch.export.export(model, args, dynamic_shapes=dynamic(*args))
    graph, session = program.module(), None
    if name != "prompts":  # Its ONNX takes as long as the three others.
        exported = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(exported)
    for rows in (6, 1, 4):
        some = tree_map(lambda x, rows=rows: x[:rows], (form(unusable(batch())), PRESENT))
        torch.testing.assert_close(graph(*some), expected[:rows], rtol=0, atol=1e-5)
        if session is None:
            continue
        names = [x.name for x in session.get_inputs()]
        (logits,) = session.run(None, dict(zip(names, (x.numpy() for x in tree_leaves(some)), strict=True)))
        torch.testing.assert_close(torch.from_numpy(logits), expected[:rows], rtol=0, atol=1e-5)


def test_compiled():
    """With prompts: test_compiled_training."""
    torch._dynamo.reset()
    make, form = MODELS["own"]
    model = fitted(make, form)
    expected = model(form(batch()), PRESENT).detach()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for rows in (6, 4):
        some = tree_map(lambda x, rows=rows: x[:rows], form(unusable(batch())))
        torch.testing.assert_close(compiled(some, PRESENT[:rows]), expected[:rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["own", "prompts"])
def test_compiled_training(name):
    """The same loss, gradients and marks as in eager mode, though what stands in missing rows is NaN."""
    torch._dynamo.reset()
    model = MODELS[name][0]()
    twin, results = copy.deepcopy(model), []
    for each, run in ((model, torch.compile(model, fullgraph=True, backend="eager")), (twin, twin)):
        loss = run(unusable(batch()), PRESENT, LABELS, {"subcase_weight": 0.3})
        loss.backward()
        gradients = [p.grad for p in each.parameters() if p.requires_grad]
        results.append([loss.detach(), *gradients, *each.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_mask_zeros_are_missing_in_a_graph_too():
    model, inputs = fitted(own, same), batch()
    padded = {name: x * PRESENT[:, m].view(-1, *[1] * (x.dim() - 1)) for m, (name, x) in enumerate(inputs.items())}
    program = torch.export.export(model, (inputs,), dynamic_shapes=dynamic(inputs))
    torch.testing.assert_close(program.module()(padded), model(inputs, PRESENT).detach(), rtol=0, atol=1e-5)


def test_a_modality_that_is_left_out_of_a_graph_is_missing():
    model, text = fitted(own, same), {"text": batch()["text"]}
    expected = model(text, PRESENT & torch.tensor([False, True])).detach()
    for x in (text, {**text, "image": None}):
        graph = torch.export.export(model, (x, PRESENT)).module()
        torch.testing.assert_close(graph(x, PRESENT), expected, rtol=0, atol=1e-5)


def test_lists_cannot_be_recorded():
    inputs = {**batch(), "text": [None, *batch()["text"][1:]]}
    with pytest.raises(TypeError, match=r"mappings of them, in a recorded graph, but got lists of \['text'\]"):
        torch.export.export(own().eval(), (inputs,))


class Masked(nn.Module):
    def forward(self, x, mask):
        assert x[~mask].isfinite().all()
        return torch.where(mask, 0, x)


def test_blank_rows_of_boolean_masks():
    """A traced graph, too."""
    model = attach({"image": Masked()}, 3, in_features={"image": 4}).eval().requires_grad_(False)
    x, mask, present = torch.randn(3, 4), torch.rand(3, 4) < 0.2, torch.tensor([[True], [False], [True]])
    expected = model({"image": {"x": x, "mask": mask}}, present)
    x[1] = torch.nan
    wrapped = torch.jit.trace(lambda x, mask, p: model({"image": {"x": x, "mask": mask}}, p), (x, mask, present))
    torch.testing.assert_close(wrapped(x, mask, present), expected)


def test_an_encoder_that_says_nan_is_an_error():
    model, x = attach({"image": nn.Identity()}, 3, in_features={"image": 4}), torch.ones(3, 4)
    x[1, 2] = torch.nan
    for labels in (None, torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="finite features of 'image', but row 1 has others; if it lacks"):
            model({"image": x}, None, labels)
    present = torch.tensor([[True], [False], [True]])
    assert model({"image": x}, present)[1].tolist() == [0, 0, 0]
    assert model.head.seen.tolist() == [[2]]
