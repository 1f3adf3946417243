"""The zoo: adapters in hundreds of architectures of other libraries, in tiny random forms."""
