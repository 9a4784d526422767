"""What is stored and how: ids, tables, payload shards, manifests, and the protocols that join the other packages.

Imports nothing of this project's other packages; needs only numpy, pyarrow and safetensors.
"""
