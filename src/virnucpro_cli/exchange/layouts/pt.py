"""Parts that the layouts of PyTorch files share: they are read as tensors and plain values only."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def save(content: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(content, path)


def tensor(values: NDArray[Any]) -> Any:
    """A copy of values [...] as an fp32 tensor (a view would be saved with all that it is a view of)."""
    import torch

    return torch.from_numpy(values.astype(np.float32))


def array(value: Any) -> NDArray[Any]:
    """A tensor [...] as an array of its dtype; bfloat16, which NumPy does not have, becomes float32."""
    import torch

    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is anything but a dictionary of tensors and plain values."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path.name}: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a dictionary")
    return content


def first_of(path: Path, pattern: str) -> dict[str, Any]:
    """The content of a .pt file, or of one in a folder; empty if there is none."""
    first = next(path.glob(pattern), None) if path.is_dir() else path if path.suffix == ".pt" else None
    return load(first) if first is not None and first.is_file() else {}
