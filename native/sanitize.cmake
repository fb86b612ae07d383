# -DHASTEN_SANITIZE=ON: an extension that checks its own reads, writes and arithmetic, and `race`, a program that checks its threads.
# Slow, for `make sanitize` alone. AddressSanitizer and ThreadSanitizer cannot share a program, hence two.
option(HASTEN_SANITIZE "AddressSanitizer and UndefinedBehaviorSanitizer in the extension; the program `race` with ThreadSanitizer" OFF)
if(NOT HASTEN_SANITIZE)
  return()
endif()

set(checked -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
target_compile_options(_native PRIVATE ${checked} -O1 -g -fno-omit-frame-pointer)
target_link_options(_native PRIVATE ${checked})
set_target_properties(_native PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)

get_target_property(kernels _native SOURCES)
list(FILTER kernels INCLUDE REGEX "^src/")
list(FILTER kernels EXCLUDE REGEX "/(bind_.*|module)\\.cpp$")
add_executable(race tests/race.cpp ${kernels})
target_compile_features(race PRIVATE cxx_std_20)
target_compile_options(race PRIVATE -O1 -g -ffp-contract=off -Wall -Wextra -Wno-tsan -fsanitize=thread)
target_link_options(race PRIVATE -fsanitize=thread)
target_link_libraries(race PRIVATE Threads::Threads)
