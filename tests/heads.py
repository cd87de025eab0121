"""Heads for tests: a program that pickles a whole module as VirNucPro's train.py does, in a process of its own."""

from pathlib import Path

import children

PROGRAM = """
import numpy, sys, torch
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
rows = scale * torch.randn(600, features)
if len(sys.argv) > 5:
    rows = torch.from_numpy(numpy.load(sys.argv[5])).float()
for _ in range(40):
    head(rows)
head.eval()
with torch.no_grad():  # half of the rows are virus
    head.output_layer.bias[1] -= head(rows).diff().median()
torch.save(head, f"{folder}/head.pth")
torch.save(head.state_dict(), f"{folder}/state.pth")
with torch.no_grad():
    scores = torch.cat([F.softmax(head(part), dim=1) for part in rows.split(256)])
numpy.savez(f"{folder}/rows.npz", rows=rows.numpy(), scores=scores.numpy())
"""


def pickled_head(folder: Path, features: int, hidden: int = 512, rows: Path | None = None) -> Path:
    """head.pth, a pickled `__main__.MLPClassifier`; state.pth; and rows.npz, features with the module's own scores.

    rows: a file of features [n, D], of which the head calls half virus; made-up ones by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = children.python(PROGRAM, folder, features, hidden, 0.3, *([rows] if rows else []))
    assert program.wait() == 0, program.err
    return folder / "head.pth"
