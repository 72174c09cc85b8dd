"""Two nodes, as two network namespaces with a cable between them: they train as one, and notice when one is lost."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import same
from training import folder as run_folder

ROOT = Path(__file__).parents[2]
NODES = ("bsim-test-0", "bsim-test-1")
WORDS = "--method moco --sim_weight 0.5 --split train[:200] --batch_size 32 --steps 120 --checkpoint_every 5".split()
pytestmark = pytest.mark.slow


def ip(words, **options):
    return subprocess.run(["ip", *words.split()], capture_output=True, text=True, **options)


@pytest.fixture
def nodes():
    if os.getuid():
        pytest.skip("wants root, to make network namespaces")
    for node in NODES:
        ip(f"netns del {node}")
    made = [ip(f"netns add {node}") for node in NODES]
    made.append(ip(f"link add cable0 netns {NODES[0]} type veth peer name cable1 netns {NODES[1]}"))
    if any(done.returncode for done in made):
        pytest.skip(f"wants network namespaces: {[done.stderr for done in made]}")
    try:
        for i, node in enumerate(NODES):
            ip(f"-n {node} addr add 10.77.0.{i + 1}/24 dev cable{i}", check=True)
            ip(f"-n {node} link set cable{i} up", check=True)
            ip(f"-n {node} link set lo up", check=True)
        yield
    finally:
        for node in NODES:
            ip(f"netns del {node}")


@contextmanager
def started(*words, script=ROOT / "bsim.py"):
    """torchrun on both nodes; what is left of them is killed."""
    found = []
    for i, node in enumerate(NODES):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"cable{i}", "PYTHONPATH": str(ROOT)}
        meet = "--nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29511 --node-rank".split()
        command = ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run", *meet, str(i)]
        output = open(f"node{i}.log", "a")  # noqa: SIM115
        command += [str(script), *words]
        found.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        yield found
    finally:
        for process in found:
            kill(process)


def kill(node):
    """All of a node at once, as when its power fails."""
    listed = list(map(int, subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()))
    found = [node.pid]
    for one in found:
        found += [child for child, parent in zip(listed[::2], listed[1::2]) if parent == one]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def finish(both):
    for i, process in enumerate(both):
        assert process.wait(timeout=200) == 0, Path(f"node{i}.log").read_text()


KEEPS_THE_METHOD = """
import os, torch, flags, train
from methods.moco import Method
made, init = [], Method.__init__
def keep(self, *args, **heads):
    init(self, *args, **heads)
    made.append(self)
Method.__init__ = keep
flags.launch(train.pretrain, "bsim.py")
torch.save(made[0].state_dict(), f"end-{os.environ['RANK']}.pt")
"""


def test_two_nodes_train_as_one_and_survive_the_loss_of_one(nodes, place):
    Path("keeps.py").write_text(KEEPS_THE_METHOD)
    with started(*WORDS, "--eval_every", "0", "--out", "whole", script="keeps.py") as both:
        finish(both)
    one, two = (torch.load(f"end-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert "queue" in one and same(one, two)  # slow encoder, queue and batch statistics included

    took = {}
    for way in ("killed", "cable"):
        with started(*WORDS, "--eval_every", "0", "--out", way) as (first, second):
            while not Path(way, "checkpoints", "step_000010").exists():
                assert first.poll() is None and second.poll() is None, Path("node0.log").read_text()
                time.sleep(0.05)
            if way == "cable":
                ip(f"-n {NODES[1]} link set cable1 down")
            else:
                kill(second)
            start = time.time()
            assert first.wait(timeout=100) == 1
            took[way] = time.time() - start
            assert second.wait(timeout=60) != 0  # it has lost the first
        ip(f"-n {NODES[1]} link set cable1 up")
        said = Path("node0.log").read_text()
        last = run_folder.last_checkpoint(Path(way))
        assert f"{last} is whole: start again with --resume {way}" in said
        assert ("process 1 on " if way == "cable" else "another process has ended") in said
        with started("--resume", way) as both:
            finish(both)
        assert same(
            *(load_file(run_folder.last_checkpoint(Path(run)) / "method.safetensors") for run in (way, "whole"))
        )
    assert max(took.values()) < 60, took
