"""What the four programs share, one noun per file.

Import it before Dynamo, whose logger reads its level from the environment when it is loaded.
"""

import os

_DEFAULTS = {
    "DYN_REQUEST_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "etcd",
    "DYN_EVENT_PLANE": "nats",
    "DYN_LOG": "error,request_span=off",  # the programs write their own line per request
}

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
