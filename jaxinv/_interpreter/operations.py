"""Operations by name."""

# Elementwise operations of numbers that theories of paths and of layers see through.
ELEMENTWISE = frozenset(
    "add sub mul div neg max min abs sign and or not xor eq ne gt ge lt le select_n integer_pow "
    "convert_element_type add_any exp sqrt square floor ceil pow".split()
)
