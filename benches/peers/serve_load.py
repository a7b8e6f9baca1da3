"""Many clients at once, each with a blend of its own.

    python benches/peers/serve_load.py CUVEE MODEL_DIR --adapter NAME=DIR [--adapter ...] [--clients 64] [--seconds 120]

Every client asks again as soon as it is answered, every other time as a stream; some leave in the middle. Before, each asks
alone; all later answers must equal that one. Prints errors, answers, tokens and first-token latencies, how even the clients' shares are,
and the server's memory over time.
"""
import argparse
import http.client
import json
import threading
import time
from urllib.parse import urlparse

from serving import server

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("--adapter", action="append", required=True)
parser.add_argument("--clients", type=int, default=64)
parser.add_argument("--seconds", type=float, default=120)
parser.add_argument("--tokens", type=int, default=48)
parser.add_argument("--share", type=float, default=0.1, help="the largest weight of an adapter")
a = parser.parse_args()
names = [adapter.split("=")[0] for adapter in a.adapter]
prompts = ["The film was", "I think that", "An actor who", "It is not"]


def asked(i):
    shares = [(i * (k + 3) % a.clients) / a.clients * a.share for k in range(len(names))]
    return {
        "prompt": prompts[i % 4],
        "max_tokens": a.tokens // 2 + i % (a.tokens // 2 + 1),
        "temperature": i % 2,
        "seed": i,
        "soup": dict(zip(names, shares)),
        "stop": ["\u2603"] if i % 3 == 0 else None,
    }


def post(host, body):
    connection = http.client.HTTPConnection(host, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def complete(host, body):
    """Text, seconds to the first token where it is streamed, and the status."""
    began, first = time.monotonic(), None
    connection, response = post(host, body)
    if response.status != 200:
        status, _ = response.status, response.read()
        connection.close()
        return "", None, status
    if not body.get("stream"):
        text = json.loads(response.read())["choices"][0]["text"]
    else:
        text, ended = "", False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                first = first or time.monotonic() - began
                text += json.loads(line[6:])["choices"][0]["text"]
        assert ended
    connection.close()
    return text, first, 200


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def client(i, host, alone, until, log):
    turn = 0
    while time.monotonic() < until:
        body = asked(i) | {"stream": turn % 2 == 1}
        began = time.monotonic()
        try:
            if turn % 16 == 15:
                connection, response = post(host, body | {"stream": True})
                response.read(64)
                connection.close()
                log.append((i, "left", 0, None))
            else:
                text, first, status = complete(host, body)
                what = "ok" if status == 200 and text == alone[i] else f"status {status}" if status != 200 else "another text"
                log.append((i, what, time.monotonic() - began, first))
        except Exception as error:
            log.append((i, repr(error), 0, None))
        turn += 1


def percentiles(values):
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(share * len(values)))]
    return ", ".join(f"{name} {at(share) * 1000:.0f} ms" for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1)))


with server(a.cuvee, a.model, *[word for adapter in a.adapter for word in ("--adapter", adapter)]) as (process, address):
    host = urlparse(address).netloc
    alone = [complete(host, asked(i))[0] for i in range(a.clients)]
    log, memory, until = [], [], time.monotonic() + a.seconds
    threads = [threading.Thread(target=client, args=(i, host, alone, until, log)) for i in range(a.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(resident(process.pid))
        time.sleep(a.seconds / 40)
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/metrics")
    left = [line for line in connection.getresponse().read().decode().splitlines() if line.split(" ")[0] in ("cuvee_running", "cuvee_waiting", "cuvee_cache_rows_used", "cuvee_completion_tokens_total", "cuvee_abandoned_total")]

answers = [entry for entry in log if entry[1] == "ok"]
errors = sorted({entry[1] for entry in log} - {"ok", "left"})
counts = [sum(entry[0] == i for entry in answers) for i in range(a.clients)]
warm = memory[len(memory) // 4]
print(f"{a.clients} clients, {a.seconds:.0f} s: {len(answers)} answers as alone, {sum(e[1] == 'left' for e in log)} clients left, errors {errors or 'none'}")
print(f"an answer: {percentiles([entry[2] for entry in answers])}")
print(f"first token: {percentiles([entry[3] for entry in answers if entry[3]])}")
print(f"answers of a client: least {min(counts)}, most {max(counts)}, mean {sum(counts) / len(counts):.1f}")
print(f"memory: {memory[0]:.0f} MiB at the start, {warm:.0f} after a quarter, {memory[-1]:.0f} at the end, most {max(memory):.0f}")
print("; ".join(left))
raise SystemExit(bool(errors) or not answers)
