import pytest

from moetune.errors import UsageError
from moetune.inputs.launch_command import find

SERVERS = {
    "vllm serve M -tp 8": ("vllm", "vllm serve", "M -tp 8"),
    "/opt/venv/bin/vllm serve M": ("vllm", "vllm serve", "M"),
    "python -m vllm.entrypoints.openai.api_server --model M": ("vllm", "vllm serve", "--model M"),
    "python3 -m sglang.launch_server --model-path M --tp 8": ("sglang", "sglang serve", "--model-path M --tp 8"),
    "sglang serve --model-path M": ("sglang", "sglang serve", "--model-path M"),
    "trtllm-serve M --ep_size 8": ("trtllm", "trtllm-serve", "M --ep_size 8"),
    "trtllm-serve serve M": ("trtllm", "trtllm-serve", "M"),
    "mpirun -n 8 trtllm-bench --model M throughput": ("trtllm", "trtllm-bench", "--model M throughput"),
    "python -m dynamo.vllm --model M": ("vllm", "dynamo.vllm", "--model M"),
    "python3 -m dynamo.sglang --model-path M": ("sglang", "dynamo.sglang", "--model-path M"),
    "python3 -m dynamo.trtllm --model-path M": ("trtllm", "dynamo.trtllm", "--model-path M"),
    "docker run --gpus all -p 8000:8000 vllm/vllm-openai:v0.33.0 --model M": ("vllm", "vllm serve", "--model M"),
    "docker run lmsysorg/sglang python3 -m sglang.launch_server --model-path M": (
        "sglang", "sglang serve", "--model-path M",
    ),
    "docker run --rm image bash -c 'pip install x && vllm serve M -dp 8'": ("vllm", "vllm serve", "M -dp 8"),
    'bash -lc "cd /work; vllm serve M -ep 2>&1 | tee log"': ("vllm", "vllm serve", "M -ep"),
    "nohup numactl -N 0 vllm serve M > log 2>&1 &": ("vllm", "vllm serve", "M"),
    "echo vllm serve X; vllm serve M": ("vllm", "vllm serve", "M"),
    'CMD ["vllm", "serve", "M", "-tp", "8"]': ("vllm", "vllm serve", "M -tp 8"),
    "vllm serve M # -tp 8": ("vllm", "vllm serve", "M"),
}  # fmt: skip


@pytest.mark.parametrize("text", SERVERS)
def test_the_server_is_found_wherever_it_stands(text):
    found = find(text)
    arguments = " ".join(word.text for word in found.arguments)
    assert (found.engine, found.program, arguments) == SERVERS[text]


@pytest.mark.parametrize(
    "text",
    [
        "VLLM_X=1 vllm serve M",
        "export VLLM_X=1; vllm serve M",
        "env VLLM_X=1 vllm serve M",
        "docker run -e VLLM_X=1 vllm/vllm-openai M",
        "docker run --env=VLLM_X=1 vllm/vllm-openai M",
        "bash -c 'export VLLM_X=1 && vllm serve M'",
    ],
)
def test_a_variable_reaches_the_server_however_it_is_set(text):
    assert find(text).variables["VLLM_X"].text == "1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ls -l", "finds no server"),
        ("", "finds no server"),
        ("vllm serve A & vllm serve B", r"finds 2 servers: \(1\) vllm serve A; \(2\) vllm serve B"),
        ("vllm serve 'A", "quote"),
        ("vllm serve M –tp 8", "begins with an en dash"),
        ("vllm serve M —tp 8", "begins with an em dash"),
        ("vllm serve M\n--tensor-parallel-size 8", "does not end with a backslash"),
    ],
)
def test_what_is_no_line_of_one_server_is_said(text, said):
    with pytest.raises(UsageError, match=said):
        find(text)


def test_the_words_before_the_first_argument_are_the_launcher():
    found = find("docker run --gpus all vllm/vllm-openai-rocm M -tp 8")
    assert found.launcher[-1] == "vllm/vllm-openai-rocm"
    assert found.spelled == "docker run --gpus all vllm/vllm-openai-rocm M -tp 8"
