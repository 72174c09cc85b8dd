"""The files in configs/: Accelerate reads them as meant; the Slurm script stops, queues itself again and resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from tests.test_train import lines
from training import folder as run_folder

ROOT = Path(__file__).parent.parent
SHORT = "--method simclr --split train[:200] --batch_size 32 --log_every 1 --eval_every 0 --out run".split()


@pytest.mark.parametrize(
    "name, kind, machines, processes",
    [
        ("cpu", "NO", 1, 1),
        ("gpu", "NO", 1, 1),
        ("8gpu", "MULTI_GPU", 1, 8),
        ("2x8gpu", "MULTI_GPU", 2, 16),
    ],
)
def test_accelerate_reads_them(name, kind, machines, processes):
    found = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert (found.distributed_type, found.num_machines, found.num_processes) == (kind, machines, processes)
    assert found.use_cpu == (name == "cpu")


def test_cuda_visible_devices_says_which_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    arguments = launch_command_parser().parse_args(["--config_file", str(ROOT / "configs" / "gpu.yaml"), "bsim.py"])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.slow
def test_the_cpu_configuration_trains(place):
    command = ["accelerate", "launch", "--config_file", str(ROOT / "configs" / "cpu.yaml"), str(ROOT / "bsim.py")]
    done = subprocess.run([*command, *SHORT, "--steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lines("run")[-1]["step"] == 2


STUBS = {
    "srun": 'exec env SLURM_NODEID=0 SLURM_GPUS_ON_NODE=8 "$@"',
    "scancel": 'echo "scancel $*" >> said; kill -TERM "$(cat trainer)"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "scontrol $*" >> said; fi',
    "accelerate": 'echo "accelerate $*" >> said; while [ "$1" != bsim.py ]; do shift; done; shift; '
    f'echo $$ > trainer; exec {sys.executable} {ROOT}/bsim.py "$@"',
}


@pytest.mark.slow
def test_the_slurm_script_queues_itself_again_and_goes_on(place):
    """With stand-ins for Slurm's commands and for `accelerate`, which wants 16 GPUs."""
    for name, body in STUBS.items():
        (place / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (place / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{place}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    command = ["bash", str(ROOT / "configs" / "slurm.sh"), *SHORT, "--steps"]
    job = subprocess.Popen([*command, "80"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path("run/metrics.jsonl").exists() or len(lines("run")) < 3:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=200) == 0
    said = Path("said").read_text()
    assert "--num_processes 16 --machine_rank 0 --main_process_ip node1 --main_process_port 20123 bsim.py" in said
    assert said.endswith("scancel --signal=TERM 123\nscontrol requeue 123\n")
    step = int(run_folder.last_checkpoint(Path("run")).name[5:])
    assert 3 <= step < 80
    assert subprocess.run([*command, "80"], env=environment, capture_output=True).returncode == 0
    assert [line["step"] for line in lines("run")] == list(range(1, 81))
    assert Path("said").read_text().count("requeue") == 1
