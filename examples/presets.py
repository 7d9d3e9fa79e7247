"""The published settings of DPL by data set, what is missing, and how often: what clip_finetune.py takes with --preset.

`datasets/dpl_presets.json` has the numbers of the run scripts of DPL's two programs on CLIP, DPL_DCP with DCP's prompts
(36 of them, in 6 blocks) and DPL_NoPrompt without. All that is trained has one learning rate there.
In DPL_NoPrompt the code for Food-101 and Hateful Memes multiplies the prototype loss by zero, whatever λ the script
gives. What ran is what is used, here as there. Where two versions of a script were published, the first in the file is
used, and the other is named.
"""

import json
from pathlib import Path
from typing import Any

from files import InputError

PUBLISHED = json.loads((Path(__file__).parent / "datasets" / "dpl_presets.json").read_text("utf-8"))
PROMPTS = {"DPL_DCP": "dcp", "DPL_NoPrompt": "none"}
VARIANTS = sorted({row["variant"] for row in PUBLISHED["rows"]})


def published(variant: str, dataset: str, missing: str, rate: float) -> tuple[dict[str, Any], str]:
    """The settings by option, and what there is to say about them.

    Raises:
        InputError: If none were published for it.
    """
    keys = {"variant": variant, "dataset": dataset, "missing": missing}
    rows = [row for row in PUBLISHED["rows"] if row.items() >= keys.items()]
    found = [row for row in rows if row["missing_rate"] == rate]
    if not found:
        rates = ", ".join(str(rate) for rate in sorted({row["missing_rate"] for row in rows})) or "none"
        where = f"{variant} on {dataset} with {missing} missing"
        raise InputError(f"Expected --missing-rate to be one of those published for {where}: {rates}; but got {rate}.")
    chosen, *others = found
    notes = [f"Its script says λ {chosen['weight']}, but its code multiplies this loss by zero."]
    if chosen["weight"] == chosen["weight_as_run"]:
        notes = []
    notes += [f"Published as well: λ {row['weight_as_run']} (commit {row['commit']})." for row in others]
    settings = {**PUBLISHED["common"], "weight": chosen["weight_as_run"], "margin": chosen["margin"]}
    settings |= {"encoder_lr": settings["lr"], "prompts": PROMPTS[variant], "head": "prototype"}
    return settings, " ".join(notes)
