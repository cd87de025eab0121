# Galaxy's tools, the data manager and both repositories, by planemo's linters. Without the tool shed, planemo shed_lint cannot compare versions.
# pip: planemo==0.75.47
repositories="packaging/galaxy/virnucpro packaging/galaxy/data_manager_virnucpro"
planemo lint --recursive --fail_level warn $repositories
planemo shed_lint --tools --fail_level warn --skip version_bumped $repositories
