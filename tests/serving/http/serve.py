"""A server in a process of its own: `python -m tests.serving.http.serve CREATE OPTIONS`."""

import argparse
import sys

from hashtab.serving.http import add_server_arguments, run, server_settings

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("create")
    add_server_arguments(parser)
    arguments = parser.parse_args()
    sys.exit(run(arguments.create, server_settings(arguments)))
