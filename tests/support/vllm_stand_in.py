"""Stand-ins that record what TRL sends to vLLM, for tests without vLLM: its engine, and TRL's client of its server.

They generate random tokens. `sent` holds name -> tensor for each update of the weights.
"""

import contextlib
from types import SimpleNamespace

import torch


class Receiver:
    """Records the weights that it is sent."""

    def __init__(self) -> None:
        self.sent, self.incoming = [], {}

    def receive(self, name, tensor) -> None:
        """Take one tensor, each name once."""
        assert name not in self.incoming
        self.incoming[name] = tensor.detach().clone()

    def reset_prefix_cache(self) -> None:
        """End an update of the weights, as TRL does."""
        self.sent.append(self.incoming)
        self.incoming = {}


class LLM(Receiver):
    """vLLM's engine in the trainer's process."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.arguments = arguments
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=runner)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=64))

    def load_weights(self, weights) -> None:
        """Take weights."""
        for name, tensor in weights:
            self.receive(name, tensor)

    def generate(self, prompts, sampling_params, use_tqdm=False) -> list:
        """Return outputs in the form of vLLM's."""
        count = sampling_params.n
        return [SimpleNamespace(prompt_token_ids=[5], outputs=[output() for _ in range(count)]) for _ in prompts]


class SamplingParams(SimpleNamespace):
    """vLLM's arguments for a generation."""


class Client(Receiver):
    """TRL's client of a server."""

    def __init__(self, base_url, group_port, connection_timeout) -> None:
        super().__init__()

    def init_communicator(self, device) -> None:
        """Connect."""

    def get_server_info(self) -> dict:
        """Describe the server."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params) -> None:
        """Take weights, which must match their metadata."""
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named_params, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            self.receive(name, tensor)

    def update_named_param(self, name, weights) -> None:
        """Take one weight."""
        self.receive(name, weights)

    @contextlib.contextmanager
    def weight_update(self):
        """Group the weights of one update."""
        yield

    def generate(self, prompts, n, **_) -> dict:
        """Return outputs in the form of TRL's client."""
        ids = [output().token_ids for _ in range(n * len(prompts))]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": [[[-1.0]] * 2] * len(ids)}


def output() -> SimpleNamespace:
    """Return an output of two random tokens."""
    ids = torch.randint(5, 100, (2,)).tolist()
    return SimpleNamespace(token_ids=ids, logprobs=[{id: SimpleNamespace(rank=1, logprob=-1.0)} for id in ids])


def install(monkeypatch, *modules) -> None:
    """Make modules of TRL use these stand-ins as if vLLM were installed."""
    for module in modules:
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
        monkeypatch.setattr(module, "VLLMClient", Client)
        for kind in (LLM, SamplingParams):
            monkeypatch.setattr(module, kind.__name__, kind, raising=False)
