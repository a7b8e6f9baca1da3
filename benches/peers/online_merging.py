#!/usr/bin/env python3
"""Seconds of an optimizer step on the weights of SmolLM2-135M: the authors' online merging optimizers, or torch's AdamW, and cuvee's.

    python online_merging.py --optimizers FILE --cuvee BINARY [--rule ondare] [--steps 3] [--rounds 3]

FILE is `online_merging/optimizers.py` of QwenLM/online_merging_optimizers, BINARY what `cargo bench --bench optimizer --no-run`
names. Both take turns, each in a process of its own; the first step of each turn, which allocates, is not counted.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time


def shapes():
    yield (49152, 576)
    yield (576,)
    for _ in range(30):
        yield from [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]


def peer(args):
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.nn.Parameter(size * torch.randn(s)) for s in shapes())

    model = Model(0.02)
    params = list(model.weights)
    if args.rule == "adamw":
        optimizer = torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, foreach=False, fused=args.fused)
    else:
        spec = importlib.util.spec_from_file_location("optimizers", args.optimizers)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cls = module.OTAdamW if args.rule == "onties" else module.ODAdamW
        names = {(0, i): name for i, (name, _) in enumerate(model.named_parameters())}
        optimizer = cls(params, lr=1e-6, eps=1e-8, reserve_p=0.01, param_name_map=names, use_merge=True, alpha=1e-7,
                        rescale=args.rule == "ondare-rescale")
        reference = Model(1e-3)  # minus a base of zeros: a task vector of this size
        base = Model(0.0)
        optimizer.init_ref_param_diff(reference, base)
        del reference, base
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        optimizer.step()
        print(f"{time.perf_counter() - start:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers")
    parser.add_argument("--cuvee")
    parser.add_argument("--rule", default="ondare", choices=["adamw", "ondare", "ondare-rescale", "onties"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fused", action="store_true", help="torch's fused AdamW")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    commands = {
        "peer": [sys.executable, *sys.argv, "--peer"],
        "cuvee": [args.cuvee, args.rule, str(args.steps + 1)],
    }
    env = dict(os.environ, RAYON_NUM_THREADS=str(args.threads))
    seconds = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
            seconds[name] += [float(line) for line in lines[1:]]
            print(name, *lines[1:], flush=True)
    peer_s, cuvee_s = (statistics.median(seconds[name]) for name in commands)
    print(f"{args.rule}, {args.threads} threads: peer {peer_s:.3f} s, cuvee {cuvee_s:.3f} s a step, ratio {peer_s / cuvee_s:.1f}")


if __name__ == "__main__":
    main()
