"""The examples on MAP's and DCP's kind of module learn, and refuse wrong arguments."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

import dcp_clip
import map_vilt


def call(monkeypatch, example, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, arguments)])
    example.main()


def table(printed):
    """Case -> (rows, percent right)."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:] if line.startswith("| ")]
    return {case: (int(count), float(right)) for case, count, right, _ in rows}


def test_map_learns(monkeypatch, capsys):
    call(monkeypatch, map_vilt, "--rows", 600, "--steps", 70, "--lr", 2e-3)
    scores = table(capsys.readouterr().out)
    assert {case: count for case, (count, _) in scores.items()} == {"image+text": 150, "image": 75, "text": 75}
    assert scores["image+text"][1] > 60  # Chance is 11, and 33 with one modality.
    assert scores["image"][1] > 20
    assert scores["text"][1] > 20


def test_dcp_learns(monkeypatch, capsys):
    call(monkeypatch, dcp_clip, "--rows", 600, "--steps", 40)
    scores = table(capsys.readouterr().out)
    assert {case: count for case, (count, _) in scores.items()} == {"image+text": 150, "image": 75, "text": 75}
    assert scores["image+text"][1] > 75  # Chance is 50.
    assert scores["image"][1] > 60
    assert scores["text"][1] > 60


def test_map_takes_weights_from_a_folder(monkeypatch, capsys, tmp_path):
    from transformers import BertTokenizer

    vilt, _ = map_vilt.build(None)
    vilt.save_pretrained(tmp_path)
    words = " ".join([*map_vilt.CAPTIONS, *map_vilt.DISHES]).replace("{}", "").split()
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *dict.fromkeys(words)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary[: vilt.config.vocab_size]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    kept = {}
    monkeypatch.setattr(map_vilt, "attach", lambda module, *args, **kw: kept.update(module=attach(module, *args, **kw)))
    attach = sys.modules["protohead"].attach
    call(monkeypatch, map_vilt, "--pretrained", tmp_path, "--rows", 64, "--steps", 3)
    assert "| image+text |" in capsys.readouterr().out
    module = kept["module"]
    # Only the prompts and the head have been trained.
    trained = {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"complete_prompt", "missing_text_prompt", "missing_img_prompt", "food101_classifier"}
    for name, p in vilt.encoder.named_parameters():
        assert torch.equal(module.transformer["blocks"].get_parameter(name.removeprefix("layer.")), p)


def test_dcp_takes_weights_from_a_file(monkeypatch, capsys, tmp_path):
    import open_clip

    tiny = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-for-a-test", tiny)
    torch.save(open_clip.create_model("tiny-for-a-test").state_dict(), tmp_path / "tiny.pt")
    arguments = "--model", "tiny-for-a-test", "--pretrained", tmp_path / "tiny.pt", "--rows", 64, "--steps", 3
    call(monkeypatch, dcp_clip, *arguments)
    assert "| image+text |" in capsys.readouterr().out


def test_towers_without_prompts_are_open_clips():
    torch.manual_seed(0)
    clip, tokenizer = dcp_clip.build(None, None)
    image, ids = torch.randn(3, 3, 32, 32), tokenizer(["a film", "", "one night nature"])
    clip.eval()
    with torch.no_grad():
        nothing = [torch.zeros(3, 0, 64)]
        torch.testing.assert_close(dcp_clip.encode_image(clip.visual, image, nothing), clip.encode_image(image))
        torch.testing.assert_close(dcp_clip.TextEncoder(clip)(ids, nothing), clip.encode_text(ids))


def test_features_without_prompts_are_vilts():
    torch.manual_seed(0)
    vilt, tokenize = map_vilt.build(None)
    module = map_vilt.ViLTransformerSS(vilt.eval(), 9, prompt_length=0, train_all=True)
    rows = map_vilt.make_rows(6, 0.5, map_vilt.random.Random(0))
    batch = map_vilt.collate(rows, tokenize, 32)
    batch = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    batch["image"] = [batch["image"][0].cpu()]
    with torch.no_grad():
        ours = module.infer(batch)
        theirs = vilt(batch["text_ids"], batch["text_masks"], pixel_values=batch["image"][0])
    torch.testing.assert_close(ours["text_feats"], theirs.last_hidden_state[:, : batch["text_ids"].shape[1]])
    torch.testing.assert_close(ours["image_feats"][:, 0], theirs.last_hidden_state[:, batch["text_ids"].shape[1]])
    torch.testing.assert_close(ours["cls_feats"], theirs.pooler_output)


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (map_vilt, ["--rows", 5], "--rows >= 32"),
        (map_vilt, ["--steps", 0], "--steps >= 1"),
        (dcp_clip, ["--missing-rate", 1.5], "--missing-rate in [0, 1]"),
        (dcp_clip, ["--lr", 0], "--lr > 0"),
        (map_vilt, ["--prototype-weight", -1], "`prototype_weight` to be a number in [0, inf), but got -1.0"),
        (dcp_clip, ["--prototype-weight", "nan"], "`prototype_weight` to be a number in [0, inf), but got nan"),
        (map_vilt, ["--pretrained", "/nowhere/at/all"], "/nowhere/at/all"),
        (dcp_clip, ["--pretrained", "laion2b"], "Expected --model beside --pretrained"),
        (dcp_clip, ["--model", "no-such-model"], "no-such-model"),
        (dcp_clip, ["--model", "RN50"], "such as ViT-B-32"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, example, arguments, message):
    with pytest.raises(SystemExit):
        call(monkeypatch, example, *arguments)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
