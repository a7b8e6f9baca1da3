"""f32 matrix products of PyTorch (MKL) on one thread, at the shapes of `cargo bench --bench ops -- linear`.

    python benches/peers/matmul.py

Prints GFLOP/s of y = x W^T, dx = dy W and dW = dy^T x, the best of many by the process's own CPU time, which other
programs on the machine disturb least.
"""
import time

import torch

torch.set_num_threads(1)
for rows, inputs, outputs in [(1200, 576, 1536), (1200, 1536, 576), (2048, 896, 4864), (960, 128, 384)]:
    x, w, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    flop, best = 2 * rows * inputs * outputs, [1e9] * 3
    for _ in range(max(10, int(2e10 / flop))):
        times = [time.process_time()]
        for product in (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x):
            product()
            times.append(time.process_time())
        best = [min(b, t1 - t0) for b, t0, t1 in zip(best, times, times[1:])]
    figures = ", ".join(f"{name} {flop / t / 1e9:.0f}" for name, t in zip(("y", "dx", "dW"), best))
    print(f"{rows}x{inputs}x{outputs}: {figures} GFLOP/s")
