// What csrc/registration.cpp asks the toolkit's header of this name.

#pragma once

#define CUDART_VERSION 0
