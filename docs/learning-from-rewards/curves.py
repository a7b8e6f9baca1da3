"""The training reward of every arm by the tokens it sampled, from the folder of `cuvee compare`: curves.svg and a table.

    python3 curves.py ../../runs/learning-from-rewards

A point is the mean over seeds of the mean over a window of 5 steps. Prints, for some rewards, the sampled tokens (thousands) and
seconds of steps until the window of each seed first reached them, and for how many seeds it did.
"""
import json
import pathlib
import statistics
import sys

WINDOW, WIDTH, HEIGHT, LEFT, TOP = 5, 760, 420, 60, 20
COLORS = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e"]
runs = pathlib.Path(sys.argv[1]) / "runs"
arms = {}
for arm in sorted(runs.iterdir()):
    for seed in sorted(arm.glob("seed-*/model/metrics.jsonl")):
        lines = [json.loads(line) for line in open(seed, encoding="utf-8")]
        if "num_sampled_tokens" not in lines[-1]:
            continue
        windows = [lines[max(0, i - WINDOW + 1):i + 1] for i in range(len(lines))]
        arms.setdefault(arm.name, []).append([
            (line["num_sampled_tokens"] / 1000, statistics.mean(x["reward"] for x in some), sum(x["step_time"] for x in lines[:i + 1]))
            for i, (line, some) in enumerate(zip(lines, windows))][WINDOW - 1:])

mean = {name: [[statistics.mean(point[k] for point in step) for k in range(2)] for step in zip(*seeds)] for name, seeds in arms.items()}
points = [point for curve in mean.values() for point in curve]
most, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
across = lambda x: LEFT + x / most * (WIDTH - LEFT - 200)
down = lambda y: TOP + (high - y) / (high - low) * (HEIGHT - TOP - 50)
out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
       f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
for k in range(6):
    x, y = most * k / 5, low + (high - low) * k / 5
    out.append(f'<line x1="{LEFT}" x2="{across(most):.0f}" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#ddd"/>')
    out.append(f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    out.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 30}" text-anchor="middle">{x:.0f}</text>')
out.append(f'<text x="{across(most / 2):.0f}" y="{HEIGHT - 10}" text-anchor="middle">tokens sampled, thousands</text>')
out.append(f'<text transform="translate(14 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">reward in training</text>')
for color, (name, curve) in zip(COLORS, mean.items()):
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in curve)
    out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"><title>{name}</title></polyline>')
# Names stand beside the ends of their curves, apart from each other.
at = TOP
for color, (name, curve) in sorted(zip(COLORS, mean.items()), key=lambda arm: -arm[1][1][-1][1]):
    at = max(at + 15, down(curve[-1][1]) + 4)
    out.append(f'<text x="{across(curve[-1][0]) + 8:.0f}" y="{at:.1f}" fill="{color}">{name}</text>')
pathlib.Path(__file__).with_name("curves.svg").write_text("\n".join(out + ["</svg>\n"]))

start = statistics.mean(curve[0][1] for curve in mean.values())
for wanted in [start + (high - start) * share for share in (0.25, 0.5, 0.75)]:
    print(f"\nreward {wanted:.2f}")
    for name, seeds in arms.items():
        first = [next((point for point in seed if point[1] >= wanted), None) for seed in seeds]
        found = [point for point in first if point]
        text = "never" if not found else (f"{statistics.mean(p[0] for p in found):6.1f} thousand tokens, "
                                          f"{statistics.mean(p[2] for p in found):5.1f} s, {len(found)} of {len(first)} seeds")
        print(f"  {name:40} {text}")
