"""The application as a Ray Serve deployment: two replicas on two nodes of this machine answer OpenAI's form."""

import json
import os
import subprocess
import sys

import pytest

from avalab.lab.run import ROOT

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install -e '.[ray]'")

# In a process of its own: Ray's threads and its warnings are not ours.
PROGRAM = """
import json, sys
from pathlib import Path
import httpx, ray
from ray import serve
from ray.cluster_utils import Cluster
from avalab.serve import cluster
from avalab.serve.policy.settings import Settings
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
nodes.add_node(**small)
ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
settings = Settings(context=256, threads=1, max_batch_size=2)
url = cluster.start([Path(sys.argv[1])], settings, port=int(sys.argv[2]), replicas=2, processors=0.75)
body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
found = []
with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
    for headers in [{}] * 6 + [{"serve_multiplexed_model_id": "tiny"}]:
        found.append(client.post("/v1/chat/completions", json=body, headers=headers).json())
    bad = client.post("/v1/chat/completions", json={"model": "none"}).status_code
print(json.dumps({"nodes": sum(n["Alive"] for n in ray.nodes()), "bad": bad, "answers": found}), flush=True)
serve.shutdown()
ray.shutdown()
nodes.shutdown()
"""


def test_two_replicas_on_two_nodes_give_the_same_answer(tiny_gguf):
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_gguf), "18765"],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"nodes"')]
    assert lines, done.stderr[-2000:]
    found = json.loads(lines[0])
    assert (found["nodes"], found["bad"]) == (2, 404)
    texts = {answer["choices"][0]["message"]["content"] for answer in found["answers"]}
    assert (len(found["answers"]), len(texts)) == (7, 1)
