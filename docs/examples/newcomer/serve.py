from my_model import pretrained

import disha

# load elsewhere
model = pretrained()
disha.load_adapter(model, "ring.safetensors")

# export
disha.interop.lora.export(model, "as-lora")

# merge
disha.merge_adapters(model)
