"""Heads for tests: a program that pickles a whole module as VirNucPro's train.py does, in a process of its own."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, torch
from torch import nn
from torch.nn import functional as F

class MLPClassifier(nn.Module):
    def __init__(self, features, hidden, classes):
        super().__init__()
        self.hidden_layer = nn.Linear(features, hidden)
        self.bn1 = nn.BatchNorm1d(hidden)
        self.output_layer = nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.output_layer(self.dropout(F.relu(self.bn1(self.hidden_layer(x)))))

folder, features, hidden, scale = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
torch.manual_seed(features)
head = MLPClassifier(features, hidden, 2)
with torch.no_grad():
    head.output_layer.weight *= 4
for _ in range(20):
    head(scale * torch.randn(64, features))
head.eval()
torch.save(head, f"{folder}/head.pth")
torch.save(head.state_dict(), f"{folder}/state.pth")
rows = scale * torch.randn(600, features)
with torch.no_grad():
    scores = torch.cat([F.softmax(head(part), dim=1) for part in rows.split(256)])
import numpy
numpy.savez(f"{folder}/rows.npz", rows=rows.numpy(), scores=scores.numpy())
"""


def pickled_head(folder: Path, features: int, hidden: int = 512, scale: float = 0.3) -> Path:
    """head.pth, a pickled `__main__.MLPClassifier`; state.pth; and rows.npz, features with the module's own scores."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", PROGRAM, str(folder), *map(str, (features, hidden, scale))], check=True)
    return folder / "head.pth"
