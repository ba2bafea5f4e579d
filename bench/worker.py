"""One side of ``flowops bench --against``: our own times, by the jobs of this folder.

Run as a module of a copy of this folder, with PYTHONPATH naming the flowops to be measured, of
which it uses what users call. Ops that this flowops doesn't have come out as failed rows.
"""

import argparse
import json
import sys
from dataclasses import asdict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--out", required=True)
    parser.add_argument("--isolated", action="store_true")
    args = parser.parse_args()
    if args.isolated:
        # An editable installation beside this one would lend it what it lacks.
        sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]

    import flowops

    from .ceilings import Ceilings
    from .job import OURS
    from .run import OPS, run_all, specs

    jobs = []
    for op in args.ops or OPS:
        try:
            jobs += specs([op], args.device)
        except (ImportError, AttributeError) as error:
            print(f"{op}: not in this flowops: {error}")
    # Floors are not asked for here: any rates do.
    rows = run_all(jobs, Ceilings(1, 1, 1, 1), args, "", (OURS,))
    with open(args.out, "w") as file:
        json.dump({"flowops": flowops.__file__, "rows": [asdict(row) for row in rows]}, file)


if __name__ == "__main__":
    main()
