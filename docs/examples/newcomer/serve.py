from my_model import pretrained

import disha

# load elsewhere
model = pretrained()
disha.load_adapter(model, "ring.safetensors")

# merge
disha.merge_adapters(model)
