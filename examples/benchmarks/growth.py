"""What does each further task take on disk? The fourteen cl14 tasks on their hierarchy, each node cut as it is sealed.

    python examples/benchmarks/growth.py --data DIR            # goes on where an earlier run stopped

A setting is a tolerance: by how many nats a token a cut may raise the loss on validation rows. 200 training rows a task, one
epoch; the ranks that nodes need after three are in the cells `alone` of planner.py.
"""

import itertools
import tempfile
from pathlib import Path

from ablation import EVAL_ROWS, MAX_INPUT_TOKENS, TRAINING
from harness import attention, cell, parser, prepare, read_tasks, sample, todo, train_hft
from hft_methods import CL14

import hft
from hft.trainers import HFTTrainer


TOLERANCES = ("0.01",)
SAMPLES = 200


class Noting(HFTTrainer):
    """Leaves with the model what the cuts of all stages found out, those of a run that was cut off included."""

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.model.trims = {task: trim for stage in self.record.stages for task, trim in stage["trims"].items()}
        return output


def sizes(model: hft.HFTForCausalLM) -> dict[str, int]:
    """Bytes of each file of a saved model's tasks and pages, by name; of all else in `shared`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = {path.relative_to(folder): path.stat().st_size for path in Path(folder).rglob("*.safetensors")}
    found = {path.stem: size for path, size in files.items() if len(path.parts) > 1}
    return {**found, "shared": sum(files.values()) - sum(found.values())}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "growth.jsonl")
    arguments.add_argument("--tolerances", default=",".join(TOLERANCES), help="nats a token, by commas")
    args = arguments.parse_args()
    backbone, tokenizer = prepare(args.backbone)
    rows, validation = read_tasks(args.data, CL14, tokenizer, MAX_INPUT_TOKENS, EVAL_ROWS)
    for tolerance, seed in todo(args.out, "growth", args.tolerances.split(","), args.seeds):
        with cell(args.out, "growth", tolerance, seed) as result:
            train = {task: sample(rows[task], SAMPLES, seed) for task in CL14}
            checks = {task: sample(validation[task], None, 0) for task in CL14}
            training = {**TRAINING, "rank_tolerance": float(tolerance)}
            model = train_hft(backbone, tokenizer, CL14, train, seed, training, Noting, checks, work=result.work)
            order = [task for level in hft.Hierarchy(CL14).levels() for task in level]
            bytes_of = sizes(model)
            pages = sum(size for name, size in bytes_of.items() if name not in order)
            result.update(value=sum(bytes_of.values()), pages_and_shared=pages, bytes=bytes_of)
            result["cumulative"] = dict(
                zip(order, itertools.accumulate(bytes_of[task] for task in order), strict=True)
            )
            result["trims"] = {
                task: [round(model.trims[task][name], 4) for name in ("old_rank", "rank", "before", "after")]
                for task in order
            }
            result.update(training=training, attention=attention())


if __name__ == "__main__":
    main()
