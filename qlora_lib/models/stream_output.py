"""What a streamed quantization has written: a shard a decoder block, and a report that says from
what, so that a killed run goes on behind its finished shards."""

import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..base.files import read_proved_json, whole_file, write_json_atomic, write_proved_json
from ..base.hashes import changes, file_hash
from .quantize import LayerReport
from .stored_weights import INDEX, stored_shapes

REPORT = "report.json"  # what OUT was made from, a row a layer, bits a parameter


class StreamOutput:
    """The shards and the report of a run, in the scratch folder that an unfinished one leaves.

    shards   first what lies outside the blocks (-1), then a block each, made in this order
    rows_of  the report's rows for each block that has its shard
    hashes   of the shards, as the report holds them
    """

    def __init__(self, scratch: Path, made_from: dict, blocks: int):
        self.scratch, self.made_from, self.rows_of, self.hashes = scratch, made_from, {}, {}
        names = [f"model-{k + 1:05}-of-{blocks + 1:05}.safetensors" for k in range(blocks + 1)]
        self.shards = [scratch / name for name in names]
        for part in scratch.glob(".*"):  # files that a kill left half written
            part.unlink()
        if not any(scratch.iterdir()):
            self._write_report()
        try:
            report = read_proved_json(scratch / REPORT)
            old, rows = dict(report["made_from"]), report_rows(report)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{scratch} can't be gone on with ({error}); delete it to start "
                             "anew") from None  # fmt: skip
        if other := changes(old, made_from):
            raise ValueError(f"{scratch} holds an unfinished run of other settings: {other}. Give "
                             "the same ones to go on, or delete that folder to start anew")
        written = report.get("shards")  # older versions did not hash them
        for block, shard in enumerate(self.shards, -1):
            if not shard.is_file():
                continue
            now = file_hash(shard)
            if written is not None and written.get(shard.name) != now:
                print(f"{shard.name}: damaged since it was written, made anew", file=sys.stderr)
                shard.unlink()
                continue
            # Rows of a block that has no shard do not count: the shard comes last.
            named = stored_shapes([shard])
            self.rows_of[block] = [row for row in rows if f"{row.name}.codes" in named]
            self.hashes[shard.name] = now

    @property
    def rows(self) -> list[LayerReport]:
        """The rows of all blocks that are done, in their order."""
        return [row for block in sorted(self.rows_of) for row in self.rows_of[block]]

    def _write_report(self, **more) -> None:
        said = {"made_from": self.made_from, "layers": [asdict(row) for row in self.rows]}
        write_proved_json(self.scratch / REPORT, said | {"shards": self.hashes} | more)

    def write(self, block: int, tensors: dict[str, Tensor], rows=()) -> None:
        """Keep the rows and the shard of a block; -1: of what lies outside."""
        shard = self.shards[block + 1]
        with whole_file(shard) as part:
            tensors = {n: t.contiguous().cpu() for n, t in tensors.items()}
            save_file(tensors, part, {"format": "pt"})
            self.rows_of[block], self.hashes[shard.name] = list(rows), file_hash(part)
            self._write_report()

    def finish(self, parameters: int) -> None:
        """Write the index, and what the model's weights take, into the report."""
        where = {n: shard.name for shard in self.shards for n in stored_shapes([shard])}
        write_json_atomic(self.scratch / INDEX, {"metadata": {}, "weight_map": where})
        size = sum(shard.stat().st_size for shard in self.shards)
        bits = round(8 * size / parameters, 4)
        self._write_report(parameters=parameters, weight_bytes=size, bits_per_parameter=bits)


def report_rows(report: dict) -> list[LayerReport]:
    """Return the rows that a report holds."""
    return [LayerReport(**row | {"shape": tuple(row["shape"])}) for row in report["layers"]]
