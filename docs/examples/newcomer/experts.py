from my_model import mixture, points

import disha

# adapt experts
layouts = {"experts": "expert out in"}
model = disha.inject_adapters(mixture(), "experts", r=2, layouts=layouts)

# check
assert disha.check_adapters(model, points).ok
