"""What the experiments with the online services share: client, servers, requests, figures."""
