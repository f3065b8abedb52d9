#!/opt/yap-text/bin/python3 -I
"""The health check of the container images: status 0 while the service answers 200 on /healthz."""

import os
import sys
from http.client import HTTPConnection, HTTPException

connection = HTTPConnection(os.environ["HOST"], int(os.environ["PORT"]), timeout=4)
try:
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    print(answer.read().decode())
except (OSError, HTTPException) as error:
    sys.exit(f"no answer: {error}")
sys.exit(answer.status != 200)
