"""Where text comes from that is put together or made here, beside the texts of `corpora`."""
