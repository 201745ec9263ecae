"""What the four programs share, one noun per file.

Import it before Dynamo, whose logger reads its level from the environment when it is loaded.
"""

import os

_DEFAULTS = {
    "DYN_REQUEST_PLANE": "nats",
    "DYN_DISCOVERY_BACKEND": "etcd",
    "DYN_EVENT_PLANE": "nats",
    "DYN_LOG": "error",
    # The runtime writes a line per request whatever DYN_LOG says (1.6.1 forces its target request_span on, and the only
    # filters that reach it, with a selector, make it slow). So it is at least one that people and grep can read.
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
}

for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
