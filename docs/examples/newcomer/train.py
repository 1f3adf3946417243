import torch
from my_model import labels, points, pretrained

import disha

# adapt
model = disha.inject_adapters(pretrained(), "all-linear", r=2)

# train
optimizer = torch.optim.AdamW(disha.adapter_parameters(model), lr=1e-2)
for _ in range(100):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(points), labels).backward()
    optimizer.step()

# save
disha.save_adapter(model, "ring.safetensors")
