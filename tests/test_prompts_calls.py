"""Prompt modules that are not as said, cases that no tower has, and calls at the same time."""

import re
import threading
from functools import partial

import pytest
import torch
from roads import UNTRAINED
from test_prompts import BOTH, LABELS, MAKE, PRESENT, WIDTHS, Shallow, Wrong, batch, more, prompted, tiny
from test_prompts_training import parts
from torch import nn

from protohead.adapters.towers import read_towers
from protohead.prompts import DcpPrompts

pytestmark = UNTRAINED


class Normed(Shallow):
    def __init__(self):
        super().__init__(WIDTHS)
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(width) for name, width in WIDTHS.items()})

    def forward(self, modality, case):
        prompts = self.norms[modality](getattr(self, modality)[int(case == modality)])
        return [lambda tokens: torch.cat([prompts.expand(len(tokens), -1, -1), tokens], dim=1)]


def test_a_module_is_as_it_was_when_it_has_been_tried():
    prompts = Normed()
    prompts.norms["text"].eval()
    read_towers(tiny(), prompts)
    assert not prompts.norms["image"].num_batches_tracked
    assert [norm.training for norm in prompts.norms.values()] == [True, False]


@BOTH
@pytest.mark.parametrize("wrong", [("image", "text"), ("text", "text+image"), ("audio", "audio"), ("image", "all")])
def test_other_cases_are_refused(kind, wrong):
    with pytest.raises(ValueError, match="or it alone, but got " + re.escape(", ".join(map(repr, wrong)))):
        MAKE[kind]()(*wrong)


def test_numbers_of_functions_that_differ():
    model = prompted(Wrong(lambda m, c: [more]))
    parts(model)[2].function = lambda m, c: [more] * (1 + (c == m))
    with pytest.raises(ValueError, match=r"as many prompt functions for each case of 'image', but got .*'image': 2"):
        model.encode(batch(), PRESENT)


def test_two_calls_at_once_are_an_error():
    model = prompted()
    _, clip, _ = parts(model)
    clip.visual.transformer.edits = [more]
    with pytest.raises(RuntimeError, match="one call at a time of each tower"):
        model.encode(batch(), PRESENT)
    assert clip.visual.transformer.edits == [more]  # Those of the other call.


def at_once(*calls):
    """What calls in threads of their own return, or raise."""
    results = [None] * len(calls)

    def run(number):
        try:
            with torch.no_grad():
                results[number] = calls[number]()
        except RuntimeError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def test_of_two_threads_that_begin_together_one_gets_an_error():
    model, inputs = prompted().eval(), batch()
    masks = torch.tensor([[True, False]]).expand(6, 2), torch.tensor([[True, True]]).expand(6, 2)
    expected = [model(inputs, mask).detach() for mask in masks]
    both, calls, ended = threading.Barrier(2), [], threading.Event()

    def begin(*_):
        calls.append(1)
        if len(calls) < 3:  # The first prompts of either.
            both.wait(5)

    def run(mask):
        try:
            return model(inputs, mask)
        finally:
            ended.set()

    _, clip, prompts = parts(model)
    prompts.register_forward_hook(begin)
    clip.visual.transformer.resblocks[0].register_forward_hook(lambda *_: ended.wait(5) and None)
    results = at_once(*(partial(run, mask) for mask in masks))
    assert sorted(type(x).__name__ for x in results) == ["RuntimeError", "Tensor"]
    for got, wanted in zip(results, expected, strict=True):
        if isinstance(got, torch.Tensor):
            torch.testing.assert_close(got, wanted)
        else:
            assert "one call at a time of each tower" in str(got)


def test_another_thread_has_the_bare_tower():
    model, inputs = prompted().eval(), batch()
    clip, bare = parts(model)[1], []
    expected = clip.encode_image(inputs["image"]).detach()

    def meanwhile(*_):
        if not bare:
            bare.append(None)
            bare[:] = at_once(partial(clip.encode_image, inputs["image"]))

    clip.visual.transformer.resblocks[0].register_forward_hook(meanwhile)
    wanted = prompted().eval()(inputs, PRESENT)
    torch.testing.assert_close(model(inputs, PRESENT), wanted)
    assert torch.equal(bare[0], expected)


def test_prompts_of_other_lengths():
    _, clip, _ = parts(model := prompted(DcpPrompts(WIDTHS, length=9, depth=4)))
    assert model.loss(batch(), PRESENT, LABELS).isfinite()
    assert clip.transformer.edits is None
