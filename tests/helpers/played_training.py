"""What `igpt-ds sweep` starts in its tests in place of a training.

    python -m tests.helpers.played_training PLAN pretrain ...

Writes the metrics that PLAN (JSON) tells of the rate, {rate: [validation loss, accuracy or null] or a word}:
"diverges" records losses above a blind guess's until it is asked to stop, "lost" ends as the health logic ends a run,
"refused" and "crashes" end with status 2 and 1; "killed once" crashes at first. Each start is a line of PLAN.started.
"""

import json
import sys
import time
from pathlib import Path

from igpt_ds.atomic import publish_text


def main() -> None:
    plan, words = Path(sys.argv[1]), sys.argv[2:]
    sets = dict(word.split("=", 1) for word in words if "=" in word)
    run, rate = Path(next(word for word in words if "/lr-" in word)), float(sets["training.learning_rate"])
    steps = int(sets.get("training.stop_at", sets["training.steps"]))
    what = json.loads(plan.read_text())[repr(rate)]
    started = plan.with_suffix(".started")
    before = started.read_text() if started.exists() else ""
    started.write_text(before + f"{rate!r}\n")
    if what == "refused":
        sys.exit(2)
    run.mkdir(parents=True, exist_ok=True)
    tree = (Path(__file__).parents[2] / "igpt_ds/config/presets/tiny.toml").read_text()
    tree = tree.replace("warmup_steps = 10", "warmup_steps = 2").replace(
        "learning_rate = 0.003", f"learning_rate = {rate}"
    )
    # Whole or not at all, as a training publishes it: the sweep looks at it meanwhile.
    publish_text(run / "config.toml", tree.replace("[data]", "[data]\nresolution = 8\npalette_size = 16"))
    lines = [{"step": step, "loss": 2.9 if what == "diverges" else 2.0} for step in range(1, 20)]
    if what == "lost":
        lines.append({"step": 20, "event": "spike", "reason": ""})
    elif isinstance(what, list):
        loss, accuracy = what
        validation = {"step": steps, "val_loss": loss, "val_images": 67}
        # Worse at the end than before: of a fine-tuning the best counts.
        earlier = {**validation, "step": steps - 1, "val_loss": 9.0}
        if accuracy is not None:
            earlier, validation = (
                {**validation, "step": steps - 1, "val_accuracy": accuracy},
                {**earlier, "step": steps, "val_accuracy": 0.0},
            )
        lines += [earlier, validation]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    deadline = time.monotonic() + 60
    while what == "diverges" and not (run / "STOP").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if what in ("lost", "crashes") or (what == "killed once" and f"{rate!r}\n" not in before):
        sys.exit(1)
    if what == "killed once":
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": steps, "val_loss": 1.5, "val_images": 67}) + "\n")


if __name__ == "__main__":
    main()
