"""What looks like a secret is refused before it is in a run's files, and no message repeats it."""

import pytest
from places import TOY

from srlm_mega.config import file
from srlm_mega.config.file import check_trackers, load_config
from srlm_mega.errors import UserError


@pytest.mark.parametrize(
    "override",
    [
        "launch.slurm.environment={WANDB_API_KEY: hush}",
        "launch.slurm.environment={NCCL_DEBUG: INFO, HF_TOKEN: hush}",
        "launch.slurm.environment={my_secret: hush}",
        "launch.slurm.environment={AWS_SECRET_ACCESS_KEY: hush}",
        "launch.slurm.environment={DB_PASSWORD: hush}",
        "launch.slurm.environment={DB_PASS: hush}",
        "launch.slurm.environment={MYSQL_PWD: hush}",
        "launch.slurm.environment={GH_PAT: hush}",
        "launch.slurm.environment={PGPASSWORD: hush}",
        "launch.slurm.environment={APIKEY: hush}",
        "launch.slurm.environment={SSH_PASSPHRASE: hush}",
        "launch.slurm.environment={GOOGLE_APPLICATION_CREDENTIALS: hush}",
        "launch.slurm.environment={accessToken: hush}",
        "launch.slurm.environment={PROXY: 'http://me:hush@host:3128'}",
        "launch.slurm.environment={STORE: 'https://host/a?api_key=hush'}",
        "launch.slurm.sbatch_options=['--export=ALL,WANDB_API_KEY=hush']",
        "launch.slurm.sbatch_options=['--qos=high', '--comment=http://me:hush@host']",
        "launch.slurm.container=https://me:hush@host/image",
        "launch.slurm.container='https://hush@host/image'",
        "launch.slurm.modules=['https://me:hush@host/module']",
        "model.path=https://me:hush@host/model",
        "seed_data.path=https://host/a?token=hush",
        "judge.template=https://me:hush@host/template",
        "tracking.wandb_project=https://me:hush@host/p",
        "tracking.mlflow_tracking_uri=https://me:hush@host/mlflow",
        "tracking.mlflow_tracking_uri=postgresql://me:hush@host/db",
        "tracking.mlflow_tracking_uri='https://host/?token=hush'",
    ],
)
def test_refused(override: str) -> None:
    with pytest.raises(UserError, match="the run keeps its configuration") as error:
        load_config(TOY, [override])
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "launch.slurm.environment={NCCL_IB_HCA: mlx5, TOKENIZERS_PARALLELISM: 'false', A: 'a:b@c', B: 'http://host:80/x'}",
        "launch.slurm.environment={NCCL_IB_PKEY: '1', UCX_IB_PKEY: '0x8001', VLLM_MAX_NUM_BATCHED_TOKENS: '8192'}",
        "launch.slurm.environment={MAX_TOKENS: '9', TORCH_CUDA_ARCH_LIST: '9.0'}",
        "launch.slurm.environment={KEYBOARD: us, PATH_INFO: a, COMPASS: n, PATTERN: a, BYPASS_CHECK: '1'}",
        "launch.slurm.sbatch_options=['--wckey=a', '--export=ALL,A=b']",
        "launch.slurm.sbatch_options=['--export=ALL,A=b', '--qos=high', '--gres=gpu:8']",
        "launch.slurm.container=docker://nvcr.io#nvidia/pytorch:25.01-py3",
        "tracking.mlflow_tracking_uri=http://host:5000",
        "tracking.mlflow_tracking_uri=sqlite:///runs.db",
        "tracking.mlflow_tracking_uri=./mlruns",
    ],
)
def test_not_refused(override: str) -> None:
    load_config(TOY, [override])


def test_a_missing_tracker_is_said_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless training runs in a container, whose packages are its own."""
    monkeypatch.setattr(file, "find_spec", lambda package: None)
    for tracker, package in (("wandb_project=p", "wandb"), ("mlflow_tracking_uri=http://host", "mlflow")):
        with pytest.raises(UserError, match=f"needs the package {package}: pip install"):
            check_trackers(load_config(TOY, [f"tracking.{tracker}"]))
        check_trackers(load_config(TOY, [f"tracking.{tracker}", "launch.slurm.container=image"]))
    check_trackers(load_config(TOY))
