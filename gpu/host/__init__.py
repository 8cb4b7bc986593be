"""The host backend: pandas and orjson, FAISS, NumPy. Twin of `headrace.gpu.rapids`, module by module."""
