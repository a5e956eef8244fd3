"""The audit log and its receipts: what was asked, permitted, done and used, and that it holds.

| file | job |
| --- | --- |
| `chain.py` | one record as one line, and how lines hold together |
| `signing.py` | the Ed25519 key, its public half, signed heads |
| `folder.py` | the files of a log, and where it ended when the server last stopped |
| `writer.py` | appends records, many in one write |
| `landing.py` | lets a request wait for its record |
| `trail.py` | what the server says to its log |
| `entry.py` | one permitted request, from its record to its result |
| `verify.py` | reads a log as a stranger would, and says what doesn't hold |
| `lately.py` | reads a log from its end, as far as it is signed |
| `receipts.py` | signed statements of single requests |
| `usage.py` | adds up what the log says of requests that have ended |
| `command.py`, `receipts_command.py`, `usage_command.py` | the commands |
"""
