"""Does training in bfloat16 cost accuracy? The same epochs in bf16 and fp32, by the command line.

Usage::

    python -m benchmarks.precision --data-dir fer2013 --arch cnn4_bn --epochs 3
"""

import statistics
import tempfile

from benchmarks import check_inputs, train
from console import ArgumentParser, number, run_script


def val_accuracy(args, precision: str, seed: int) -> float:
    """Percent on validation after the last epoch."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--precision", precision, "--seed", seed, "--epochs", args.epochs)
        return 100 * train(folder, "--data-dir", args.data_dir, "--arch", args.arch, *options)[-1]["val_acc"]


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data-dir", metavar="DIR", default=".", help="holds train/")
    add("--arch", default="cnn4_bn", help="to train")
    add("--epochs", type=number(int, 1), default=3, help="to train for")
    add("--seeds", type=number(int, 1), default=3, help="how many")
    args = parser.parse_args()
    check_inputs(args.data_dir, args.arch)
    print(f"{args.arch}, {args.epochs} epochs, validation accuracy after the last, {args.seeds} seeds")
    means = {}
    for precision in ("bf16", "fp32"):
        found = [val_accuracy(args, precision, seed) for seed in range(args.seeds)]
        means[precision] = statistics.mean(found)
        spread = f", standard deviation {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"{precision}: mean {means[precision]:.2f}%{spread} ({each})", flush=True)
    print(f"bf16 - fp32: {means['bf16'] - means['fp32']:+.2f} points")


if __name__ == "__main__":
    run_script(main)
