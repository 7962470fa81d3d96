"""An experiment that costs nothing; as a script it runs slowly enough to be killed."""

import os
import signal
import sys
import time

from normally.lab import Criterion, Experiment, decide, paired_effect, run

OFFSET = 10.0


def measure(run):
    """Of the module, so that it can be sent to another process."""
    for _ in run.epochs():
        time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
    if os.environ.get("TOY_FAILS") == f"{run.variant}{run.seed}":
        raise ValueError("the toy is broken")
    if os.environ.get("TOY_DIES") == f"{run.variant}{run.seed}":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": run.seed + (OFFSET if run.variant == "b" else 0.0)}


def make(variants=("a", "b"), seeds=3):
    experiment = Experiment(
        name="toy",
        title="A toy",
        claim="b is more than a.",
        source="nobody",
        prediction="b is about 10 more than a.",
        protocol=["Add."],
        thresholds=["5."],
        variants=variants,
        budgets={"quick": {"seeds": seeds, "epochs": 2}},
    )

    experiment.measures(measure)

    @experiment.judges
    def judge(results):
        seeds = results.seeds("a", "b")
        effect = paired_effect(
            "b - a", results.get("b", "value", seeds), results.get("a", "value", seeds)
        )
        return decide([Criterion(effect, 5.0)], f"b is {effect.estimate:g} more.")

    @experiment.presents
    def present(results):
        return [], []

    return experiment


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    run(make(seeds=20), out=sys.argv[1], jobs=int(sys.argv[2]))
