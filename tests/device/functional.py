"""`normally.functional` of tensors on the CPU, run on DEVICE."""

from __future__ import annotations

from normally import functional as library
from tests.device import carried

add_layer_norm = carried(library.add_layer_norm)
add_rms_norm = carried(library.add_rms_norm)
batch_norm = carried(library.batch_norm)
frozen_batch_norm = carried(library.frozen_batch_norm)
group_norm = carried(library.group_norm)
instance_norm = carried(library.instance_norm)
layer_norm = carried(library.layer_norm)
local_response_norm = carried(library.local_response_norm)
rms_norm = carried(library.rms_norm)
