"""A `cuvee serve` for the scripts beside this one."""
import contextlib
import re
import subprocess
import threading


@contextlib.contextmanager
def server(cuvee, model, *flags):
    """Starts one on a free port; yields its process and its address."""
    process = subprocess.Popen([cuvee, "serve", "--model", model, "--port", "0", *flags], stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                break
        else:
            raise SystemExit("".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, found[1]
    finally:
        process.terminate()
        process.wait(60)
