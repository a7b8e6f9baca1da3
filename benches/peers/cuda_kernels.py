"""Others' kernels at the shapes of `cargo bench --bench cuda`, on the same GPU and by the same clock: events around each call, the
L2 cache flushed before, the best of ten. What is not installed shows as such.

    pip install torch liger-kernel cut-cross-entropy
    python benches/peers/cuda_kernels.py [--small]

`--small` shrinks every shape and runs where there is no GPU, to prove that the script runs."""

import argparse
import importlib
import time

import torch
import torch.nn.functional as F

ROUNDS = 10
parser = argparse.ArgumentParser()
parser.add_argument("--small", action="store_true")
SMALL = parser.parse_args().small
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSH = torch.empty(1 << 10 if SMALL else 64 << 20, device=DEVICE)


def size(n):
    return -(-n // 32) if SMALL else n


# Not every CPU has bfloat16 products.
STORED = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def tensor(*shape, dtype=STORED, grad=False):
    return (0.05 * torch.randn(*shape, device=DEVICE)).to(dtype).requires_grad_(grad)


def best(call):
    """Seconds of the best of some rounds, of which the first two warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        FLUSH.zero_()
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times[2:])


def report(name, call, bytes_moved=0, flops=0):
    try:
        seconds = best(call())
    except Exception as error:  # a peer that is missing or fails is a row of the table, not the end of it
        print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | | |", flush=True)
        return
    print(f"| {name} | {1e6 * seconds:.1f} us | {bytes_moved / seconds / 1e9:.0f} | {flops / seconds / 1e12:.1f} |", flush=True)


def product(rows, inputs, outputs):
    def make():
        x, w = tensor(rows, inputs), tensor(outputs, inputs)
        return lambda: F.linear(x, w)

    report(f"torch linear y {rows} x {inputs} x {outputs}", make, flops=2 * rows * inputs * outputs)


def head(rows, hidden, vocab):
    shape, flops = f"{rows} x {hidden} x {vocab}", 2 * rows * hidden * vocab

    def inputs():
        return tensor(rows, hidden, grad=True), tensor(vocab, hidden, grad=True), torch.randint(vocab, (rows,), device=DEVICE)

    def passes(loss):
        """Forward alone, then both: the backward is their difference."""

        def forward():
            x, w, target = inputs()

            def run():
                with torch.no_grad():
                    loss(x, w, target)

            return run

        def both():
            x, w, target = inputs()

            def run():
                x.grad = w.grad = None
                loss(x, w, target).backward()

            return run

        return forward, both

    def torch_head(x, w, target):
        return F.cross_entropy(F.linear(x, w).float(), target)

    def liger(x, w, target):
        function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        out = function(x, w, target)
        return out[0] if isinstance(out, tuple) else out

    def cce(x, w, target):
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy(x, w, target)

    # Products: torch and Liger keep what CCE (and cuvee) compute again in the backward.
    for name, loss, products in [("torch", torch_head, 3), ("Liger", liger, 3), ("CCE", cce, 4)]:
        forward, both = passes(loss)
        report(f"{name} head forward {shape}", forward, flops=flops)
        report(f"{name} head forward + backward {shape}", both, flops=products * flops)


def attention(name, heads, kv_heads, head_dim, length, count):
    flops = 4 * count * length * (length + 1) // 2 * heads * head_dim

    def inputs(grad):
        q = tensor(count, heads, length, head_dim, grad=grad)
        k, v = (tensor(count, kv_heads, length, head_dim, grad=grad) for _ in range(2))
        return q, k, v

    def forward():
        q, k, v = inputs(False)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def backward():
        q, k, v = inputs(True)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        gradient = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    report(f"SDPA forward {name}", forward, flops=flops)
    report(f"SDPA backward {name}", backward, flops=flops // 2 * 5)


def update(rows, cols):
    def make():
        weight = tensor(rows, cols, dtype=torch.float32, grad=True)
        weight.grad = tensor(rows, cols, dtype=torch.float32)
        optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
        return optimizer.step

    # Gradient read; weight and moments read and written. (No bf16 copy is written, unlike in cuvee's row.)
    report(f"torch fused AdamW {rows * cols}", make, bytes_moved=28 * rows * cols)


def norms(rows, hidden):
    def make(function):
        def run():
            x, w = tensor(rows, hidden), tensor(hidden)
            return lambda: function(x, w)

        return run

    moved = 4 * rows * hidden
    report(f"torch rms_norm {rows} x {hidden}", make(lambda x, w: F.rms_norm(x, (hidden,), w)), bytes_moved=moved)
    report(f"torch layer_norm {rows} x {hidden}", make(lambda x, w: F.layer_norm(x, (hidden,), w)), bytes_moved=moved)


def main():
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}\n\n| kernel | time | GB/s | TFLOP/s |\n|---|---|---|---|")
    product(size(8192), size(8192), size(8192))
    for shape in [(8192, 4096, 14336), (8192, 4096, 4096), (8192, 576, 1536)]:
        product(*map(size, shape))
    for shape in [(8192, 4096, 131072), (16384, 2048, 248320)]:
        head(*map(size, shape))
    attention("16k hd128", 32, 8, 128, size(16384), 1)
    attention("2k hd128", 32, 8, 128, size(2048), 8)
    attention("1k hd64", 9, 3, 64, size(1024), 16)
    for hidden in (4096, 576):
        norms(size(8192), size(hidden))
    update(size(32768), size(4096))


main()
