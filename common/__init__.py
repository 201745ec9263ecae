"""What the four programs share, one noun per file: a file here serves two programs or more, each folder one.

Imported before Dynamo, it also keeps the runtime's own log quiet: version 1.6.1 writes a line about every request and
every stream, whatever DYN_LOG says. `DYNAMO_SKIP_PYTHON_LOG_INIT=` (empty) in the environment brings its log back.
"""

import os

from common import tracing

if tracing.wanted():
    tracing.import_runtime()
else:
    os.environ.setdefault("DYNAMO_SKIP_PYTHON_LOG_INIT", "1")
